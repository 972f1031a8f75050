"""How many steps a call holds: the rule on times, and the engine that keeps to it, on a clock of the test's own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dsserve.core.request import GenerationRequest
from dsserve.core.step_plan import StepPlan
from dsserve.engine import engine as engine_module
from dsserve.engine.engine import Engine
from dsserve.parallel.plan_channel import PlanChannel
from dsserve.parallel.rank import RankInfo
from dsserve.runner.base import StepLogits
from dsserve.worker.call_length import CallLength
from tests.support.paged import make_scheduler
from tests.unit.observability.test_metrics import FakeRunner, Letters

STEP_S = 0.03


def test_a_call_is_as_long_as_streams_may_wait_and_longer_where_nobody_streams() -> None:
    length = CallLength(0.15)
    assert length.limit_s(9.0, streaming=True, has_room=True) == 0.15
    assert length.limit_s(9.0, streaming=False, has_room=True) == 0.5
    assert CallLength(2.0).limit_s(9.0, streaming=False, has_room=True) == 2.0


def test_frequent_arrivals_shorten_it_while_there_is_room() -> None:
    length = CallLength(0.15)
    for arrival in range(20):
        length.arrived(arrival * 0.04)
    now = 19 * 0.04
    assert length.limit_s(now, streaming=True, has_room=True) == pytest.approx(0.02)
    assert length.limit_s(now, streaming=False, has_room=True) == pytest.approx(0.02)
    assert length.limit_s(now, streaming=True, has_room=False) == 0.15
    # They end: the time since the last one counts.
    assert length.limit_s(now + 0.2, streaming=False, has_room=True) == pytest.approx(0.1)
    assert length.limit_s(now + 9.0, streaming=False, has_room=True) == 0.5


def test_a_single_request_and_rare_ones_do_not() -> None:
    length = CallLength(0.15)
    length.arrived(0.0)
    assert length.limit_s(0.0, streaming=True, has_room=True) == 0.15
    length.arrived(10.0)
    assert length.limit_s(10.0, streaming=True, has_room=True) == 0.15


class Runner(FakeRunner):
    """Every step takes `STEP_S` of the test's clock, and as long for each ten tokens of prompts; keeps the plans."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now, self.plans = 100.0, list[StepPlan]()
        monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        self.plans.append(plan)
        read = sum(len(segment.tokens) for segment in plan.segments if segment.start == 0 or len(segment.tokens) > 1)
        self.now += STEP_S * (1 + read // 10)
        return super().execute(plan, chosen)


class Wire(PlanChannel):
    """A channel that keeps what the other ranks are told."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.sent: list[StepPlan] = []

    def send(self, plan: StepPlan) -> None:
        super().send(plan)
        self.sent.append(plan)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(monkeypatch)


@pytest.fixture
def engine(runner: Runner) -> Engine:
    scheduler = make_scheduler(runner.size, 20)
    made = Engine(runner, RankInfo(0, 0, 1, 1), lambda _: Letters(), frozenset({7}), scheduler)  # type: ignore[arg-type, return-value]
    made._channel = Wire()
    return made


def steps_of(engine: Engine, runner: Runner, max_steps: int = 99, limit_s: float = math.inf) -> int:
    """Steps of one call, which the other ranks must see end exactly once."""
    runner.plans.clear()
    engine._channel.sent.clear()  # type: ignore[attr-defined]
    engine.run(max_steps, limit_s)
    sent = engine._channel.sent  # type: ignore[attr-defined]
    assert [plan.last for plan in sent] == [False] * (len(sent) - 1) + [True]
    return len(runner.plans)


def test_a_call_holds_the_steps_that_fit_into_its_time(engine: Engine, runner: Runner) -> None:
    engine.admit(GenerationRequest("a", (5,), 1000))
    assert steps_of(engine, runner, limit_s=0.5) == 1, "a first token leaves at once"
    assert steps_of(engine, runner, limit_s=0.16) == 5
    assert steps_of(engine, runner, limit_s=0.01) == 1
    assert steps_of(engine, runner, max_steps=3, limit_s=0.5) == 3


def test_a_prompt_that_took_long_shortens_no_call_after_it(engine: Engine, runner: Runner) -> None:
    engine.admit(GenerationRequest("a", (5,) * 20, 1000))
    assert steps_of(engine, runner, limit_s=0.1) == 1
    assert steps_of(engine, runner, limit_s=0.1) == 3


def test_a_text_that_ends_ends_the_call(engine: Engine, runner: Runner) -> None:
    engine.admit(GenerationRequest("long", (5,), 1000))
    engine.admit(GenerationRequest("length", (5,), 4))
    engine.admit(GenerationRequest("waits", (5,), 3))
    steps_of(engine, runner)
    assert steps_of(engine, runner, limit_s=9.0) == 3
    assert not runner.plans[-1].last and engine._channel.sent[-1] == StepPlan(last=True)  # type: ignore[attr-defined]
    assert steps_of(engine, runner, limit_s=9.0) == 1, "the one that waited takes the row, and its first token leaves"


def test_a_prompt_in_parts_ends_no_call_before_its_first_token(engine: Engine, runner: Runner) -> None:
    engine.admit(GenerationRequest("runs", (5,), 1000))
    steps_of(engine, runner)
    engine.admit(GenerationRequest("long", (5, 6) * 25, 9))
    assert steps_of(engine, runner, limit_s=9.0) == 3
    assert [[len(segment.tokens) for segment in plan.segments] for plan in runner.plans] == [[1, 19], [1, 19], [1, 12]]


def test_a_call_with_nothing_to_do_is_one_step(engine: Engine, runner: Runner) -> None:
    assert steps_of(engine, runner, limit_s=9.0) == 1
    assert runner.plans == [StepPlan(last=True)]
