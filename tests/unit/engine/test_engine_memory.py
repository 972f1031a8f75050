"""Prompts that the device has no memory for: who is told, and when the engine gives up. No model."""

from __future__ import annotations

import pytest
import torch

from dsserve.core.request import GenerationRequest, TokenEvent
from dsserve.core.step_plan import StepPlan
from dsserve.engine.engine import MOST_MEMORY_FAILURES, Engine
from dsserve.parallel.rank import RankInfo
from dsserve.runner.base import StepLogits
from tests.support.paged import make_scheduler
from tests.unit.observability.test_metrics import FakeRunner, Letters

PART = 20


class Scarce(FakeRunner):
    """Has memory for prompts up to so many tokens, parts before included."""

    longest = 0

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        self.fits = sum(segment.end for segment in plan.segments if len(segment.tokens) > 1) <= self.longest
        return super().execute(plan, chosen)


@pytest.fixture
def runner() -> Scarce:
    return Scarce()


@pytest.fixture
def engine(runner: Scarce) -> Engine:
    scheduler = make_scheduler(runner.size, PART)
    return Engine(runner, RankInfo(0, 0, 1, 1), lambda _: Letters(), frozenset({7}), scheduler)  # type: ignore[arg-type, return-value]


def finish(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.running or engine.waiting:
        events += engine.run(4)
    return events


def statuses(events: list[TokenEvent]) -> list[int]:
    return [event.error.status for event in events if event.failed and event.error]


def test_a_prompt_that_fails_in_a_later_part_fails_alone(engine: Engine, runner: Scarce) -> None:
    runner.longest = 2 * PART
    engine.admit(GenerationRequest("runs", (5,), 12))
    engine.run(1)
    engine.admit(GenerationRequest("long", (5, 6) * 30, 9))
    engine.admit(GenerationRequest("next", (5,), 2))
    events = finish(engine)
    assert statuses(events) == [507]
    ended = {event.request_id: event.completion_tokens for event in events if event.finish_reason}
    assert ended == {"runs": 12, "next": 2}


def test_a_large_step_is_tried_in_halves_before_anybody_fails(runner: Scarce) -> None:
    scheduler = make_scheduler(runner.size, 2048)
    engine = Engine(runner, RankInfo(0, 0, 1, 1), lambda _: Letters(), frozenset({7}), scheduler)  # type: ignore[arg-type, return-value]
    runner.longest = 1100
    for name in "abc":
        engine.admit(GenerationRequest(name, (*((5, 6) * 200), int(name, 16) % 3, *((5, 6) * 49), 5), 3))
    events = finish(engine)
    assert {event.request_id: event.completion_tokens for event in events if event.finish_reason} == dict.fromkeys(
        "abc", 3
    )
    assert not any(event.failed for event in events)


@pytest.mark.parametrize("prompt_logprobs", [True, False])
def test_only_prompts_that_had_room_at_load_end_the_engine(engine: Engine, prompt_logprobs: bool) -> None:
    for index in range(MOST_MEMORY_FAILURES - 1 + 5 * prompt_logprobs):
        engine.admit(GenerationRequest(str(index), (5, 6), 9, prompt_logprobs=prompt_logprobs))
        assert statuses(finish(engine)) == [507]
    engine.admit(GenerationRequest("last", (5, 6), 9))
    if not prompt_logprobs:
        with pytest.raises(torch.OutOfMemoryError, match="fitted at load"):
            finish(engine)
