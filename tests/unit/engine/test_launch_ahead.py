"""Steps that are launched before the last one's tokens are read: the same texts as without, on a real small model.

On a CPU nothing runs at the same time, but the order of all that is done is a GPU's, and each step's input tokens are
those that the device chose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dsserve.core.request import GenerationRequest, SamplingParams, StopConditions
from dsserve.core.step_plan import StepPlan
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Observer, Step
from dsserve.parallel.plan_channel import PlanChannel
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.base import StepLogits
from dsserve.sampling import gpu_sampler
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.support.paged import ALONE, make_engine, make_scheduler
from tests.support.schedules import (
    CONTEXT,
    EOS,
    PART,
    SLOTS,
    VOCABULARY,
    Schedule,
    differences,
    draw_less,
    make_llama,
    make_text,
    play,
)
from tests.support.torch_pages import fake_capture, use_graphs

CPU, PAGE = torch.device("cpu"), 4


class Channel(PlanChannel):
    """Keeps what the other ranks would be told in each call."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.calls: list[list[StepPlan]] = [[]]

    def send(self, plan: StepPlan) -> None:
        super().send(plan)
        self.calls[-1].append(plan)

    def end_call(self) -> None:
        super().end_call()
        self.calls.append([])


class Runner(ModelRunner):
    """Checks that no cell is written outside of a row, and keeps what was computed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.done: list[tuple[StepPlan, torch.Tensor | None, StepLogits]] = []

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        assert chosen is not None or not plan.is_ahead
        assert all(segment.end <= self.max_model_len for segment in plan.segments)
        found = super().execute(plan, chosen)
        if found is not None:
            self.done.append((plan, None if chosen is None else chosen.clone(), found))
        return found


@pytest.fixture(params=["eager", "graphs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How steps and choices run."""
    fake_capture(monkeypatch)
    return request.param


class Counter(Observer):
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.outcomes: list[str] = []

    def stepped(self, step: Step) -> None:
        self.steps.append(step)

    def ended(self, sequence: Any, outcome: Any) -> None:
        self.outcomes.append(outcome)


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    """One thread is enough for it, and on a busy machine many times as fast as several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_llama()
    torch.set_num_threads(threads)


Make = Callable[..., Engine]


@pytest.fixture
def make(model: LlamaForCausalLM, way: str) -> Make:
    def make_one(ahead: bool, observer: Observer | None = None, pages: int = SLOTS * CONTEXT // PAGE) -> Engine:
        size = KVSize(SLOTS, CONTEXT, pages, PAGE)
        runner = Runner(model, size, ALONE, CPU)
        sampler = DeviceSampler(SLOTS, VOCABULARY, CPU)
        if ahead and way == "graphs":
            use_graphs(runner, 2 * PART)
            sampler.capture(None)
            runner.done.clear()
        launch = sampler.launch if ahead else HostChoice
        scheduler = make_scheduler(size, 2 * PART, PART)
        engine = make_engine(
            runner, scheduler, make_text, eos=EOS, observer=observer, launch=launch, launch_ahead=ahead
        )
        engine._channel = Channel()
        return engine

    return make_one


def calls_of(engine: Engine) -> list[list[StepPlan]]:
    """The plans of each call so far. The others leave a call with the last one of its plans."""
    *calls, rest = engine._channel.calls  # type: ignore[attr-defined]
    assert not rest
    assert all([plan.last for plan in call] == [False] * (len(call) - 1) + [True] for call in calls)
    return calls


def plans_of(engine: Engine) -> list[StepPlan]:
    return [plan for call in calls_of(engine) for plan in call]


@pytest.mark.parametrize("seed", range(24))
def test_the_texts_are_those_without(make: Make, seed: int) -> None:
    schedule, counter = Schedule.draw(seed), Counter()
    engine = make(True, counter)
    expected, found = play(make(False), ALONE, schedule, cancel=False), play(engine, ALONE, schedule)
    assert differences(schedule, expected, found) == []
    ends = [end for name in schedule.requests if (end := found.end(name)) is not None]
    assert len(counter.outcomes) == len(schedule.requests)
    assert sum(step.generated for step in counter.steps) >= sum(tokens for _, tokens, _ in ends)
    calls_of(engine)


@pytest.mark.parametrize("pages", [13, SLOTS * CONTEXT // PAGE])
@pytest.mark.parametrize("seed", range(300, 304))
def test_plans_are_all_that_other_ranks_need(make: Make, model: LlamaForCausalLM, seed: int, pages: int) -> None:
    """They have no graphs here, so that they compute in another way, and get each plan as the channel carries it."""
    engine = make(True, pages=pages)
    play(engine, ALONE, Schedule.draw(seed))
    other = ModelRunner(model, engine._runner.size, ALONE, CPU)  # type: ignore[attr-defined]
    done = engine._runner.done  # type: ignore[attr-defined]
    assert [plan for plan, *_ in done] == [plan for plan in plans_of(engine) if plan.segments]
    for plan, chosen, expected in done:
        found = other.execute(StepPlan.decode(plan.encode()), chosen)
        assert found is not None
        torch.testing.assert_close(found.next, expected.next, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.prompts, expected.prompts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(100, 105))
def test_rows_that_are_left_to_the_host_change_no_text(
    make: Make, monkeypatch: pytest.MonkeyPatch, seed: int, share: float
) -> None:
    schedule = Schedule.draw(seed)
    expected = play(make(False), ALONE, schedule, cancel=False)
    monkeypatch.setattr(gpu_sampler, "draw", draw_less(share))
    engine = make(True)
    void = count_void(engine)
    assert differences(schedule, expected, play(engine, ALONE, schedule)) == []
    assert sum(void) > 0


def count_void(engine: Engine) -> list[int]:
    """How many rows of each step were launched with a token that was not chosen."""
    void, take_back = [], engine._take_back_rows

    def note(texts: Any, flight: Any) -> None:
        before = len(flight.void)
        take_back(texts, flight)
        void.append(len(flight.void) - before)

    engine._take_back_rows = note  # type: ignore[method-assign]
    return void


class Panic(BaseException):
    """As pyo3's for a panic of Rust: no Exception."""


class Fails:
    """In the place of what one sequence needs each step: works so many times, then panics."""

    def __init__(self, of: Any, times: int) -> None:
        self._of, self._times = of, times
        self.stopped = False

    def _use(self) -> None:
        self._times -= 1
        if self._times < 0:
            raise Panic("a user's text")

    def __next__(self) -> float:
        self._use()
        return next(self._of)

    def put_back(self, number: float) -> None:
        self._times += 1
        self._of.put_back(number)

    def allowed(self, width: int) -> Any:
        self._use()
        return torch.ones(width, dtype=torch.bool).numpy()

    def accept(self, token: int) -> None:
        pass

    is_complete = False

    def push(self, token: int, may_stop: bool = True) -> str:
        self._use()
        return self._of.push(token, may_stop)

    def extend(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return self._of.flush()


def break_some(engine: Engine, kind: str, every: int) -> set[str]:
    """One in so many sequences fails after some tokens; their names come in when they are admitted."""
    admit, broken, seen = engine.admit, set[str](), itertools.count(1)

    def admit_one(request: GenerationRequest, origin: Any = None) -> None:
        admit(request, origin)
        number, sequence = next(seen), list(engine._scheduler._waiting)[-1]
        if number % every or request.max_new_tokens == 0:
            return
        broken.add(request.request_id)
        if kind == "numbers":
            sequence.state.uniforms = Fails(sequence.state.uniforms, number % 4)  # type: ignore[assignment]
        elif kind == "text":
            sequence._text = Fails(sequence._text, number % 4)  # type: ignore[assignment]
        else:
            sequence.state.grammar = Fails(None, number % 4)  # type: ignore[assignment]

    engine.admit = admit_one  # type: ignore[method-assign]
    return broken


@pytest.mark.parametrize("kind", ["numbers", "text", "grammar"])
@pytest.mark.parametrize("seed", range(200, 203))
def test_rows_that_panic_change_no_other_text(
    make: Make, seed: int, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # and some steps are void
        monkeypatch.setattr(gpu_sampler, "draw", draw_less(0.4))
    schedule, counter = Schedule.draw(seed), Counter()
    engine = make(True, counter)
    broken = break_some(engine, kind, every=2)
    expected, found = play(make(False), ALONE, schedule, cancel=False), play(engine, ALONE, schedule)
    wrong = {line.partition(":")[0] for line in differences(schedule, expected, found)}
    failed = {name for name in schedule.requests if (end := found.end(name)) is not None and end[2]}
    assert wrong <= broken and failed <= broken
    assert failed or not wrong
    assert all(expected.text(name).startswith(found.text(name)) for name in broken)
    assert len(counter.outcomes) == len(schedule.requests) and counter.outcomes.count("error") == len(failed)
    assert engine.run(4) == [] and not engine._flights and engine._scheduler.kv.usage == 0
    calls_of(engine)
    assert "a user's text" not in caplog.text and caplog.text.count("Panic at test_launch_ahead.py") == len(failed)


def test_a_row_that_panics_in_a_step_launched_ahead_keeps_the_token_before(make: Make) -> None:
    engine = make(True)
    for name in "ab":
        sampling = SamplingParams(1.0, seed=3)
        engine.admit(GenerationRequest(name, (7, 8, 9), 12, sampling, StopConditions(ignore_eos=True)))
    sequence = engine._scheduler._waiting.first
    sequence.state.uniforms = Fails(sequence.state.uniforms, 4)  # type: ignore[assignment]
    events = [event for _ in range(16) for event in engine.run(1)]
    texts = {name: "".join(event.text for event in events if event.request_id == name) for name in "ab"}
    assert len(texts["b"].split()) == 12 and texts["a"].split() == texts["b"].split()[:4]
    assert [event.failed for event in events if event.is_last] == [True, False]
    assert any(plan.is_ahead for plan in plans_of(engine)[:4])


def test_most_steps_are_launched_ahead_and_tokens_are_counted_once(make: Make) -> None:
    counter = Counter()
    engine = make(True, counter)
    for name in "abc":
        engine.admit(
            GenerationRequest(name, (7, 8, 9), 20, SamplingParams(1.0, seed=3), StopConditions(ignore_eos=True))
        )
    events = [event for _ in range(30) for event in engine.run(2)]
    assert [event.completion_tokens for event in events if event.is_last] == [20, 20, 20]
    plans = [plan for plan in plans_of(engine) if plan.segments]
    assert [plan.is_ahead for plan in plans] == [False] + [True] * 19
    assert sum(step.generated for step in counter.steps) == 60 and len(counter.steps) == 20
    assert [step.decoded for step in counter.steps] == [0] + [3] * 19
    assert all(one.ended <= other.started for one, other in zip(counter.steps, counter.steps[1:], strict=False))


def test_the_device_works_between_calls(make: Make) -> None:
    """Every call but the last leaves a step in flight, and the tokens read in a call leave in it."""
    engine = make(True)
    engine.admit(GenerationRequest("a", (7, 8, 9), 6, stop=StopConditions(ignore_eos=True)))
    for call in range(1, 7):
        (event,) = engine.run(1)
        assert event.completion_tokens == call
        assert len(engine._flights) == (call < 6)
    assert [len(call) for call in calls_of(engine)] == [2, 1, 1, 1, 1, 1]


def test_one_that_comes_while_a_step_is_in_flight_joins_in_the_step_after_it(make: Make) -> None:
    engine = make(True)
    engine.admit(GenerationRequest("a", (7, 8, 9), 20, stop=StopConditions(ignore_eos=True)))
    engine.run(1)
    engine.admit(GenerationRequest("b", (9, 8), 20, stop=StopConditions(ignore_eos=True)))
    assert [(event.request_id, event.completion_tokens) for event in engine.run(1)] == [("a", 2)]
    assert {(event.request_id, event.completion_tokens) for event in engine.run(1)} == {("a", 3), ("b", 1)}


def test_a_call_that_finds_nothing_but_a_step_of_rows_that_left(make: Make) -> None:
    engine = make(True)
    engine.admit(GenerationRequest("a", (7, 8, 9), 20, stop=StopConditions(ignore_eos=True)))
    engine.run(1)
    engine.evict("a")
    assert engine.running == 0 and engine._flights
    assert engine.run(4) == [] and not engine._flights
    assert engine._scheduler.kv.usage == 0
    assert not any(plan.segments for plan in calls_of(engine)[-1])


@pytest.mark.parametrize(
    "more",
    [
        {"sampling": SamplingParams(logprobs=0)},
        {"sampling": SamplingParams(repetition_penalty=1.1)},
        {"sampling": SamplingParams(logit_bias={3: 1.0})},
        {"sampling": SamplingParams(min_tokens=30)},
        {"sampling": SamplingParams(1.0, top_k=128)},
        {"sampling": SamplingParams(logprobs=0), "prompt_logprobs": True},
    ],
)
def test_no_step_meets_rows_that_need_the_host(make: Make, more: dict[str, Any]) -> None:
    engine = make(True)
    engine.admit(GenerationRequest("plain", (7, 8, 9), 8, stop=StopConditions(ignore_eos=True)))
    engine.admit(GenerationRequest("other", (7, 8), 6, stop=StopConditions(ignore_eos=True), **more))
    while engine.running or engine.waiting:
        engine.run(1)
    plans = [plan for plan in plans_of(engine) if plan.segments]
    assert [plan.is_ahead for plan in plans] == [False] * 7 + [True]


def test_a_void_row_is_computed_again_and_the_others_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host chooses for the sampled row: each of its steps that was launched ahead is void."""
    monkeypatch.setattr(gpu_sampler, "draw", draw_less(1.0))
    counter = Counter()
    engine = make(True, counter)
    void, ignore = count_void(engine), StopConditions(ignore_eos=True)
    engine.admit(GenerationRequest("host", (7, 8, 9), 10, SamplingParams(1.0, seed=3), ignore))
    engine.admit(GenerationRequest("device", (7, 8), 10, stop=ignore))
    events = []
    while engine.running or engine.waiting:
        events += engine.run(1)
    assert {event.request_id: event.completion_tokens for event in events if event.is_last} == {
        "host": 10,
        "device": 10,
    }
    assert 0 < sum(void) <= 10 and all(count <= 1 for count in void)
    assert sum(step.generated for step in counter.steps) == 20
    starts = [segment.start for plan in plans_of(engine) for segment in plan.segments if segment.row == 1]
    assert starts == sorted(set(starts)), "no token of the other one is computed twice"


def test_a_text_that_ends_while_another_one_waits_leaves_at_once(make: Make) -> None:
    engine = make(True)
    engine.admit(GenerationRequest("a", (7, 8, 9), 3, stop=StopConditions(ignore_eos=True)))
    engine.admit(GenerationRequest("b", (7, 8), 9, stop=StopConditions(ignore_eos=True)))
    engine.run(1)
    engine.run(1)
    engine.admit(GenerationRequest("c", (7, 6), 9))
    assert [(event.request_id, event.finish_reason) for event in engine.run(9)] == [("a", "length"), ("b", None)]
    (ahead, _) = calls_of(engine)[-1]
    assert [(segment.source, len(segment.tokens)) for segment in ahead.segments] == [(1, 1), (-1, 2)]


def test_prompts_without_memory_are_tried_again_with_no_step_behind_them(make: Make) -> None:
    engine = make(True)
    full = iter([False, True])
    engine._runner._memory.run = lambda prefill, *_, **__: None if next(full, False) else prefill()  # type: ignore[attr-defined]
    engine._runner._graphs = None  # type: ignore[attr-defined]  # what is captured has its memory
    engine.admit(GenerationRequest("runs", (7, 8, 9), 9, stop=StopConditions(ignore_eos=True)))
    events = engine.run(1)
    for name in "ab":
        engine.admit(GenerationRequest(name, (7, 8, 9), 4, stop=StopConditions(ignore_eos=True)))
    events += [event for _ in range(15) for event in engine.run(2)]
    ends = {event.request_id: event.completion_tokens for event in events if event.is_last}
    assert ends == {"runs": 9, "a": 4, "b": 4}
    plans = [[len(segment.tokens) for segment in plan.segments] for plan in plans_of(engine)]
    assert plans[:5] == [[3], [1], [1, 3, 3], [1, 3, 3], [1, 1, 1]]


def test_without_the_setting_every_step_waits(make: Make) -> None:
    engine = make(True)
    engine._may_launch_ahead = False
    engine.admit(GenerationRequest("a", (7, 8, 9), 8))
    while engine.running or engine.waiting:
        engine.run(1)
    assert not any(plan.is_ahead for plan in plans_of(engine))
