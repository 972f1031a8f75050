"""What one row raises ends that row alone: its neighbours get the tokens that they would have had."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsserve.core.errors import RequestError
from dsserve.core.request import GenerationRequest, SamplingParams, TokenEvent
from dsserve.core.step_plan import StepPlan
from dsserve.engine.engine import Engine
from dsserve.parallel.rank import RankInfo
from dsserve.runner.base import StepLogits
from dsserve.sampling.faults import Fault, attempt, describe
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.grammar import GrammarCompiler, GrammarError
from dsserve.sampling.penalties import RowEdits
from dsserve.sampling.pending import HostChoice, Launch
from dsserve.sampling.sampler import SamplingState
from tests.support.paged import make_scheduler
from tests.support.sampling import make_logits, states_of
from tests.unit.engine.test_detokenizer import byte_level
from tests.unit.observability.test_metrics import EOS, SLOTS, VOCABULARY, FakeRunner, Letters

CPU, WIDTH = torch.device("cpu"), 300
# Greedy and drawn, free and ruled, edited and not.
ROWS = [
    SamplingParams(),
    SamplingParams(1.0, seed=1),
    SamplingParams(0.8, top_p=0.9, seed=2),
    SamplingParams(1.0, top_k=5, typical_p=0.9, seed=3),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(1.1, presence_penalty=0.5, min_p=0.05, seed=4),
    SamplingParams(1.0, top_k=9, seed=5),
]
each_way = pytest.mark.parametrize("way", ["host", "device"])


class Panic(BaseException):
    """As pyo3's: no Exception."""


class Raises:
    """In the place of a grammar, a stream of numbers or a history."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def allowed(self, width: int) -> np.ndarray:
        raise self._error

    def __next__(self) -> float:
        raise self._error


def launch_of(way: str, rows: int, width: int = WIDTH) -> Launch:
    return HostChoice if way == "host" else DeviceSampler(rows, width, CPU).launch


def break_grammar(state: SamplingState) -> None:
    state.grammar = Raises(Panic("a user's text"))  # type: ignore[assignment]


def break_numbers(state: SamplingState) -> None:
    state.uniforms = Raises(RuntimeError("a user's text"))  # type: ignore[assignment]


def break_rules(state: SamplingState) -> None:
    """On the device the numbers were made before; the host's are made with those of other rows."""
    state.params = SamplingParams(1.0, top_p="a user's text")  # type: ignore[arg-type]
    state.numbers = ("a user's text",)  # type: ignore[assignment]


def break_edits(state: SamplingState) -> None:
    broken = SamplingParams(presence_penalty="a user's text")  # type: ignore[arg-type]
    state.edits = RowEdits(broken, (1,), frozenset())


BREAKS = [break_grammar, break_numbers, break_rules, break_edits]


@each_way
@pytest.mark.parametrize("broken", range(len(ROWS) + 1))
@pytest.mark.parametrize("break_one", BREAKS, ids=lambda one: one.__name__)
def test_neighbours_get_the_tokens_that_they_would_have_had(
    break_one: Callable[[SamplingState], None], broken: int, way: str
) -> None:
    rows = [*ROWS[:broken], SamplingParams(1.0, seed=9), *ROWS[broken:]]
    launch = launch_of(way, len(rows))
    sane, states = states_of(rows), states_of(rows)
    break_one(states[broken])
    for step in range(3):
        logits = make_logits(step, len(rows), WIDTH, 3.0, torch.bfloat16, "plain")
        expected, found = launch(logits, sane).read(), launch(logits, states).read()
        others = [row for row in range(len(rows)) if row != broken]
        assert [found[row] for row in others] == [expected[row] for row in others]
        assert [state.fault is not None for state in states] == [row == broken for row in range(len(rows))]
        fault = states[broken].fault
        assert fault is not None and "user" not in fault.cause and ".py:" in fault.cause
        for row in others:
            sane[row].accept(expected[row])
            states[row].accept(found[row])


def test_a_row_fails_when_its_tokens_are_read_and_not_when_they_are_launched() -> None:
    """The step before may be in flight still, whose token it has."""
    states = states_of([SamplingParams(1.0, seed=1), SamplingParams(1.0, seed=2)])
    break_numbers(states[0])
    logits = make_logits(0, 2, WIDTH, 3.0, torch.float32, "plain")
    choice = DeviceSampler(2, WIDTH, CPU).launch(logits, states)
    assert states[0].fault is None and choice.tokens is not None and (choice.tokens >= 0).all()
    before = list(states[1].uniforms._ready)
    choice.take_back([0, 1])
    assert states[0].fault is None and len(states[1].uniforms._ready) == len(before) + 1
    choice = DeviceSampler(2, WIDTH, CPU).launch(logits, states)
    choice.read()
    assert states[0].fault is not None and states[1].fault is None and not choice.revised


def test_a_device_that_cannot_choose_leaves_the_step_to_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    logits = make_logits(0, len(ROWS), WIDTH, 3.0, torch.float32, "plain")
    expected = HostChoice(logits, states_of(ROWS)).read()
    monkeypatch.setattr("dsserve.sampling.gpu_sampler.draw", fail)
    choice, states = DeviceSampler(len(ROWS), WIDTH, CPU).launch(logits, own := states_of(ROWS)), own
    assert choice.read() == expected and choice.revised
    assert not any(state.fault for state in states)
    assert "OutOfMemoryError at test_faults.py" in caplog.text


@each_way
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(logit_bias={3: 1.0}), *ROWS])
def test_logits_that_are_no_numbers_fail_greedy_rows_as_well_as_drawn_ones(
    params: SamplingParams, value: float, way: str
) -> None:
    rows = [params, params, params]
    logits = make_logits(0, 3, WIDTH, 3.0, torch.float32, "plain")
    expected = HostChoice(logits, states_of(rows)).read()
    logits[1, 7] = value
    states = states_of(rows)
    found = launch_of(way, 3)(logits, states).read()
    assert [found[0], found[2]] == [expected[0], expected[2]] and found[1] == 0
    assert [state.fault is None for state in states] == [True, False, True]
    fault = states[1].fault
    assert fault is not None and fault.error is not None
    assert (fault.error.status, fault.error.code) == (500, "broken_logits")


@each_way
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0])
def test_a_row_whose_own_wishes_leave_no_token_is_told_so(temperature: float, way: str) -> None:
    request = GenerationRequest("r", (1,), 9, SamplingParams(temperature, min_tokens=2, seed=1))
    states = [SamplingState(request, frozenset(range(WIDTH))), SamplingState(request)]
    logits = make_logits(0, 1, WIDTH, 3.0, torch.float32, "plain").expand(2, -1)
    found = launch_of(way, 2)(logits, states).read()
    assert found[1] == HostChoice(logits[1:], [SamplingState(request)]).read()[0] and states[1].fault is None
    fault = states[0].fault
    assert fault is not None and fault.error is not None
    assert (fault.error.status, fault.error.code) == (400, "no_token_left")


class AllowsNothing:
    is_complete = False

    def allowed(self, width: int) -> np.ndarray:
        return np.zeros(width, dtype=bool)


@each_way
def test_a_grammar_that_allows_nothing_fails_its_row_with_400(way: str) -> None:
    states = states_of([SamplingParams(), SamplingParams()])
    states[0].grammar = AllowsNothing()  # type: ignore[assignment]
    launch_of(way, 2)(make_logits(0, 2, WIDTH, 3.0, torch.float32, "plain"), states).read()
    fault = states[0].fault
    assert fault is not None and fault.error is not None and states[1].fault is None
    assert fault.error.status == 400 and "grammar" in fault.error.message and fault.cause.startswith("GrammarError at")


def test_work_is_done_again_for_all_but_those_that_raise_alone() -> None:
    done: set[int] = set()
    calls: list[range] = []

    def work(rows: range) -> None:
        calls.append(rows)
        if {3, 17} & set(rows):
            raise Panic
        done.update(rows)

    assert set(attempt(range(20), work)) == {3, 17}
    assert done == set(range(20)) - {3, 17} and len(calls) < 20
    assert attempt(range(0), work) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_what_means_the_process_is_nobodys_fault(error: BaseException) -> None:
    def work(rows: range) -> None:
        raise error

    with pytest.raises(type(error)):
        attempt(range(3), work)


def fail_with(text: str) -> None:
    raise ValueError(text)


def test_a_fault_says_type_and_place_and_never_a_value() -> None:
    with pytest.raises(ValueError, match="text") as raised:
        fail_with("a user's text")
    assert re.fullmatch(r"ValueError at test_faults.py:\d+ \(fail_with\)", describe(raised.value))
    assert describe(Panic("a user's text")) == "Panic"
    own = RequestError("mine", status=422)
    assert Fault.of(own).error is own and Fault.of(ValueError()).error is None
    told = Fault.of(GrammarError("a user's schema")).error
    assert told is not None and told.status == 400 and "schema" in told.message and "user" not in told.message


class Poisoned(FakeRunner):
    """The row whose last token is 3 has no numbers."""

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        found = super().execute(plan)
        last = [segment.tokens[-1] for segment in plan.segments]
        for row, token in enumerate(last):
            if found is not None and token == 3:
                found.next[row] = float("nan")
        return found


class Mute(Letters):
    def push(self, token: int, may_stop: bool = True) -> str:
        raise Panic("a user's text")


def finish(engine: Engine) -> list[TokenEvent]:
    return [event for _ in range(30) for event in engine.run(4)]


@each_way
def test_the_engine_answers_a_broken_row_once_and_serves_the_others(way: str, caplog: pytest.LogCaptureFixture) -> None:
    launch = launch_of(way, SLOTS, VOCABULARY)

    def make_text(request: GenerationRequest) -> Letters:
        return Mute() if request.request_id == "mute" else Letters()

    engine = Engine(
        Poisoned(), RankInfo(0, 0, 1, 1), make_text, frozenset({EOS}), make_scheduler(FakeRunner.size), launch=launch
    )  # type: ignore[arg-type]
    for name, prompt in {"sane": (5,), "poisoned": (1,), "mute": (5,), "also sane": (5,)}.items():
        engine.admit(GenerationRequest(name, prompt, 6))
    events = finish(engine)
    ends = {event.request_id: (event.finish_reason, event.failed) for event in events if event.is_last}
    assert ends == {
        "sane": ("length", False), "poisoned": (None, True), "mute": (None, True), "also sane": ("length", False)
    }  # fmt: skip
    texts = {name: "".join(event.text for event in events if event.request_id == name) for name in ends}
    assert texts == {"sane": "gfgfgf", "poisoned": "cd", "mute": "", "also sane": "gfgfgf"}
    errors = {event.request_id: event.error for event in events if event.failed}
    assert errors["poisoned"] is not None and errors["poisoned"].code == "broken_logits" and errors["mute"] is None
    assert not engine.running and not engine.waiting
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(lines) == 2 and "a user's text" not in caplog.text
    assert "poisoned: the text cannot go on: the model's logits are no numbers" in caplog.text
    assert "mute: the text cannot go on: Panic at test_faults.py" in caplog.text


class First(FakeRunner):
    """All tokens of another vocabulary are equally likely: the first that may come is taken."""

    width = 0

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        count = len(plan.segments)
        return StepLogits(torch.zeros(count, self.width)) if count else None


@each_way
def test_a_schema_that_leads_to_a_dead_end_says_so_with_its_status(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """After a comma only a member could follow that no name is left for."""
    from llguidance import LLMatcher

    score = {"type": "integer"}
    schema = {
        "type": "object", "additionalProperties": False, "required": ["score"],
        "properties": {"score": score}, "patternProperties": {"^score$": score},
        "x-guidance": {"whitespace_pattern": "[ ]{0,2}"},
    }  # fmt: skip
    tokenizer, runner = byte_level(), First()
    runner.width = len(tokenizer)
    eos = frozenset({tokenizer.eos_token_id})
    grammars = GrammarCompiler(tokenizer, runner.width, eos)
    launch = launch_of(way, SLOTS, runner.width)
    engine = Engine(
        runner, RankInfo(0, 0, 1, 1), lambda _: Letters(), eos, make_scheduler(runner.size), grammars, launch=launch
    )  # type: ignore[arg-type, return-value]
    wanted = SamplingParams(grammar=LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    engine.admit(GenerationRequest("dead end", (5,), 60, wanted))
    engine.admit(GenerationRequest("sane", (5,), 60, SamplingParams(logit_bias={5: 9.0})))
    events = finish(engine)
    (end,) = [event for event in events if event.request_id == "dead end" and event.is_last]
    assert end.error is not None and (end.error.status, end.error.code) == (400, "grammar_dead_end")
    assert "grammar" in end.error.message and "schema" in end.error.message
    assert "dead end: the text cannot go on: GrammarError at " in caplog.text
    assert "".join(event.text for event in events if event.request_id == "sane") == "f" * 60


def test_log_probabilities_that_cannot_be_made_fail_their_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsserve.engine import output

    report = output.report_logprobs

    def report_some(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> Any:
        if 3 in counts:
            raise Panic
        return report(logits, tokens, counts)

    monkeypatch.setattr(output, "report_logprobs", report_some)
    scheduler = make_scheduler(FakeRunner.size)
    engine = Engine(FakeRunner(), RankInfo(0, 0, 1, 1), lambda _: Letters(), frozenset({EOS}), scheduler)  # type: ignore[arg-type, return-value]
    for name, count in {"sane": 2, "broken": 3}.items():
        engine.admit(GenerationRequest(name, (5,), 4, SamplingParams(logprobs=count)))
    events = finish(engine)
    assert [event.failed for event in events if event.request_id == "broken"] == [True]
    assert [len(event.logprobs[0].top) for event in events if event.request_id == "sane"] == [2] * 4
