"""Rank 0's book: rows stay dense, nobody is lost, every text ends once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.config.handler import PREFILL_TOKENS_A_STEP
from dsserve.core.request import GenerationRequest, TokenEvent
from dsserve.core.step_plan import Admission, Plan, moves
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.sequence import Sequence
from dsserve.kv.prefix_cache import PrefixCache
from dsserve.sampling.sampler import SamplingState

EOS = 0


class Letters:
    """A detokenizer for tests: token n is one letter, `!` (token 33) is a stop string."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        self.stopped = token == 33
        return "" if self.stopped else chr(token)

    def extend(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return ""


class Book(Scheduler):
    """A scheduler that takes requests, and tokens in the engine's place."""

    def put(self, name: str, prompt: int | tuple[int, ...] = 3, new: int = 5, **more: Any) -> None:
        request = GenerationRequest(name, (1,) * prompt if isinstance(prompt, int) else prompt, new, **more)
        self.add(Sequence(request, Letters(), SamplingState(request), frozenset({EOS})))  # type: ignore[arg-type]

    def enter(self, sequence: Sequence, token: int) -> TokenEvent:
        event = sequence.accept(token, None)
        if event.is_last:
            self.end(sequence)
        return event


def scheduler(
    slots: int = 4,
    kept: int = 0,
    prefill_tokens: int = PREFILL_TOKENS_A_STEP,
    idle_tokens: int | None = None,
    ratio: float = math.inf,
    by_span: bool = False,
) -> Book:
    return Book(slots, PrefixCache(slots, kept), prefill_tokens, idle_tokens, ratio, by_span)


def step(book: Book, token: int = 65) -> list[TokenEvent]:
    rows = book.rows(book.plan(last=False))
    return [book.enter(sequence, token) for sequence in rows if sequence.is_prefilled]


def test_a_request_ends_by_length_with_its_counts() -> None:
    book = scheduler()
    book.put("a", prompt=3, new=2)
    first, second = step(book)[0], step(book)[0]
    assert (first.text, first.finish_reason) == ("A", None)
    assert (second.text, second.finish_reason) == ("A", "length")
    assert (second.prompt_tokens, second.completion_tokens, second.cached_tokens) == (3, 2, 0)
    assert not book.has_work


def test_end_of_text_and_stop_strings_end_with_stop() -> None:
    for token in (EOS, 33):
        book = scheduler()
        book.put("a")
        step(book)
        event = step(book, token)[0]
        assert (event.text, event.finish_reason) == ("", "stop")


def test_a_cancelled_row_is_evicted_and_the_last_row_moves_into_it() -> None:
    book = scheduler()
    for name in "abc":
        book.put(name)
    step(book)
    book.cancel("a")
    plan = book.plan(last=False)
    assert plan.evict == (0,)
    assert [s.request.request_id for s in book.rows(plan)] == ["c", "b"]
    assert len(plan.tokens) == 2


def test_a_waiting_request_can_be_cancelled_before_it_costs_anything() -> None:
    book = scheduler()
    book.put("a")
    book.cancel("a")
    assert not book.has_work and book.plan(last=True).admit == ()


def test_a_burst_of_long_prompts_is_spread_over_steps() -> None:
    book = scheduler()
    for name in "abc":
        book.put(name, prompt=PREFILL_TOKENS_A_STEP // 2)
    assert len(step(book)) == 2
    plan = book.plan(last=False)
    assert (len(plan.tokens), len(plan.admit)) == (2, 1)


def test_a_long_prompt_is_read_in_parts_while_others_get_a_token_at_each_step() -> None:
    book = scheduler(prefill_tokens=11)
    book.put("runs", new=20)
    step(book)
    book.put("long", prompt=tuple(range(100, 125)))
    book.put("next", prompt=4)
    book.put("last", prompt=6)
    expected = [
        [Admission(tuple(range(100, 110)), complete=False)],
        [Admission(tuple(range(110, 120)), shared=10, continues=True, complete=False)],
        [Admission(tuple(range(120, 125)), shared=20, continues=True), Admission((1,) * 4)],
        [Admission((1,) * 6)],
    ]
    answered = [["runs"], ["runs"], ["runs", "long", "next"], ["runs", "long", "next", "last"]]
    for admit, names in zip(expected, answered, strict=True):
        plan = book.plan(last=False)
        ready = [sequence for sequence in book.rows(plan) if sequence.is_prefilled]
        assert plan.admit == tuple(admit)
        assert len(plan.tokens) == len(ready) - sum(admission.complete for admission in plan.admit)
        assert [book.enter(sequence, 65).request_id for sequence in ready] == names


def test_a_prompt_that_fits_into_one_step_is_not_cut() -> None:
    book = scheduler(prefill_tokens=11)
    book.put("a", prompt=7)
    book.put("b", prompt=10)
    assert [event.request_id for event in step(book)] == ["a"]
    assert book.plan(last=False).admit == (Admission((1,) * 10),)


def test_a_client_that_leaves_while_its_prompt_is_read_frees_the_row_and_what_was_read_is_kept() -> None:
    book, prompt = scheduler(kept=1, prefill_tokens=20), tuple(range(100, 150))
    book.put("gone", prompt=prompt)
    book.plan(last=False)
    assert [sequence.request.request_id for sequence in book.cancel("gone")] == ["gone"]
    book.put("again", prompt=prompt)
    plan = book.plan(last=False)
    assert (plan.keep, plan.evict) == (((0, 4),), (0,))
    assert plan.admit == (Admission(prompt[20:40], source=4, shared=20, complete=False),)


def test_a_row_that_ends_while_a_prompt_is_read_leaves_that_one_the_last() -> None:
    book = scheduler(prefill_tokens=10)
    for name in "ab":
        book.put(name)
    step(book)
    book.put("long", prompt=30)
    step(book)
    book.cancel("a")
    plan = book.plan(last=False)
    assert (plan.evict, len(plan.tokens), plan.admit[0].continues) == ((0,), 1, True)
    assert [s.request.request_id for s in book.rows(plan)] == ["b", "long"]
    assert moves(0, 3, has_part=True) == [(1, 0), (2, 1)] and moves(2, 3, has_part=True) == []
    assert moves(1, 3, has_part=True) == [(2, 1)] == moves(1, 3, has_part=False)


def test_parts_that_do_not_fit_into_memory_are_taken_back() -> None:
    book = scheduler(prefill_tokens=11)
    book.put("runs", new=9)
    step(book)
    book.put("long", prompt=14)
    book.put("short", prompt=3)
    step(book)
    plan = book.plan(last=False)
    assert [len(admission.tokens) for admission in plan.admit] == [4, 3]
    assert book.take_back(plan) is None and (book.running, book.waiting) == (2, 1)
    plan = book.plan(last=False)
    assert plan.admit == (Admission((1,) * 4, shared=10, continues=True),)
    failed = book.take_back(plan)
    assert failed is not None and failed.request.request_id == "long" and book.running == 1
    plan = book.plan(last=False)
    assert (plan.evict, plan.admit, len(plan.tokens)) == ((1,), (Admission((1,) * 3),), 1)


class Cells:
    """What every rank does with its rows, on tokens in the place of keys and values."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.kept: dict[int, list[int]] = {}
        self.has_part = False

    def execute(self, plan: Plan) -> None:
        for row, copy in plan.keep:
            self.kept[copy] = list(self.rows[row])
        for row in plan.evict:
            part = self.rows.pop() if self.has_part and row < len(self.rows) - 1 else None
            self.has_part = part is not None or (self.has_part and row < len(self.rows) - 1)
            self.rows[row] = self.rows[-1]
            self.rows.pop()
            self.rows += [] if part is None else [part]
        for row, token in enumerate(plan.tokens):
            self.rows[row].append(token)
        for admission in plan.admit:
            if admission.continues:
                before = self.rows.pop()
                assert len(before) == admission.shared
            else:
                before = self.kept.get(admission.source) or [*self.rows, []][min(admission.source, len(self.rows))]
            self.rows.append([*before[: admission.shared], *admission.tokens])
        if plan.admit:
            self.has_part = not plan.admit[-1].complete


operations = st.lists(st.tuples(st.sampled_from(["add", "cancel", "step"]), st.integers(0, 90)), max_size=80)


@settings(max_examples=200)
@given(
    operations, st.sampled_from([1, 7, 20, 512]), st.sampled_from([0, 2]), st.sampled_from([None, 60, 200]),
    st.sampled_from([0.3, 1.2, math.inf]), st.booleans(),
)  # fmt: skip
def test_rows_hold_their_own_tokens_and_every_request_ends_once_or_was_cancelled(
    script: list[tuple[str, int]], prefill_tokens: int, kept: int, idle_tokens: int | None, ratio: float, by_span: bool
) -> None:
    """Prompts of up to 90 tokens, whose first 40 are the same for two of three."""
    book = scheduler(4, kept, prefill_tokens, idle_tokens, ratio, by_span)
    cells, names, cancelled, ended = Cells(), [], set(), []
    for action, number in [*script, *[("step", 0)] * (80 * 100 if prefill_tokens == 1 else 1600)]:
        if action == "add":
            names.append(f"r{len(names)}")
            first = 0 if number % 3 else 1000 * len(names)
            prompt = tuple(token + (first if token < 40 else 1000 * len(names)) for token in range(100, 101 + number))
            book.put(names[-1], prompt=prompt, new=1 + number % 7)
        elif action == "cancel" and names:
            cancelled.add(names[number % len(names)])
            book.cancel(names[number % len(names)])
        elif book.has_work:
            joining = min(book.waiting, 4 - book.running)
            plan = book.plan(last=False)
            cells.execute(plan)
            rows = book.rows(plan)
            assert len(rows) == len(cells.rows) == book.running <= 4
            for sequence, row in zip(rows, cells.rows, strict=True):
                assert row == [*sequence.request.prompt_ids[: sequence.prefilled], *sequence._generated]
            few = joining > 1 and len(plan.tokens) * ratio <= joining if plan.tokens else True
            busy = max(prefill_tokens - len(plan.tokens), prefill_tokens // 2, 1)
            most = max(prefill_tokens, idle_tokens or 0) if few else busy
            assert sum(len(admission.tokens) for admission in plan.admit) <= most
            ready = [sequence for sequence in rows if sequence.is_prefilled]
            assert len(ready) == len(plan.tokens) + sum(admission.complete for admission in plan.admit)
            events = [book.enter(s, 65) for s in ready]
            ended += [event.request_id for event in events if event.finish_reason]
    assert not book.has_work
    assert len(ended) == len(set(ended))
    assert set(names) == set(ended) | cancelled


def test_a_step_that_nobody_waits_for_reads_more() -> None:
    book = scheduler(prefill_tokens=32, idle_tokens=100)
    for name in ("a", "b", "c"):
        book.put(name, prompt=40, new=9)
    first = book.plan(last=False)
    assert [len(admission.tokens) for admission in first.admit] == [40, 40]
    for sequence in book.rows(first):
        book.enter(sequence, 65)
    beside = book.plan(last=False)  # two streams run now
    assert len(beside.tokens) == 2 and [len(admission.tokens) for admission in beside.admit] == [30]


def test_a_burst_that_outnumbers_what_runs_is_read_as_if_nobody_waited() -> None:
    book = scheduler(slots=9, prefill_tokens=32, idle_tokens=100, ratio=1.5)
    for name in ("a", "b"):
        book.put(name, prompt=5, new=9)
    step(book)
    for name in range(3):
        book.put(str(name), prompt=30, new=9)
    plan = book.plan(last=False)
    assert len(plan.tokens) == 2 and [len(admission.tokens) for admission in plan.admit] == [30] * 3
    for sequence in book.rows(plan):
        book.enter(sequence, 65)
    for name in range(3, 6):
        book.put(str(name), prompt=30, new=9)  # fewer than run
    assert len(book.plan(last=False).admit) == 1


def test_half_of_a_step_is_for_prompts_however_many_rows_run() -> None:
    book = scheduler(slots=40, prefill_tokens=32)
    for row in range(30):
        book.put(str(row), prompt=1, new=9)
    step(book)
    book.put("long", prompt=90)
    plan = book.plan(last=False)
    assert len(plan.tokens) == 30 and [len(admission.tokens) for admission in plan.admit] == [16]


@pytest.mark.parametrize(("running", "joining", "is_large"), [(1, 1, False), (1, 2, True), (6, 2, True), (7, 2, False)])
def test_a_single_prompt_stops_nobody_and_a_burst_is_read_at_once(running: int, joining: int, is_large: bool) -> None:
    book = scheduler(slots=12, prefill_tokens=32, idle_tokens=200, ratio=0.3)
    for row in range(running):
        book.put(f"running{row}", prompt=5, new=9)
    step(book)
    for row in range(joining):
        book.put(f"joining{row}", prompt=60, new=9)
    read = [len(admission.tokens) for admission in book.plan(last=False).admit]
    assert read == ([60] * joining if is_large else [32 - running])


def test_those_who_wait_for_a_row_do_not_make_a_step_larger() -> None:
    book = scheduler(slots=4, prefill_tokens=32, idle_tokens=100, ratio=1.2)
    for name in range(4):
        book.put(str(name), prompt=5, new=2 + name)
    step(book)
    for name in range(9):
        book.put(f"late{name}", prompt=90, new=9)
    step(book)  # the first ends
    plan = book.plan(last=False)
    assert len(plan.tokens) == 3 and [len(admission.tokens) for admission in plan.admit] == [29]


def test_a_prompt_that_goes_on_while_nobody_waits_is_read_in_larger_parts() -> None:
    book = scheduler(prefill_tokens=32, idle_tokens=100)
    book.put("long", prompt=250)
    sizes = [[len(admission.tokens) for admission in book.plan(last=False).admit] for _ in range(3)]
    assert sizes == [[100], [100], [50]]


def test_text_that_can_wait_is_told_with_the_texts_end_or_when_it_is_asked_for() -> None:
    book = scheduler()
    book.put("a", prompt=3, new=5)
    (sequence,) = book.rows(book.plan(last=False))
    assert sequence.accept(65, None, may_wait=True) is None and sequence.accept(66, None, may_wait=True) is None
    told = sequence.speak()
    assert told is not None and (told.text, told.completion_tokens, told.finish_reason) == ("AB", 2, None)
    assert sequence.speak() is None
    sequence.accept(67, None, may_wait=True)
    sequence.accept(68, None, may_wait=True)
    last = sequence.accept(69, None, may_wait=True)
    assert last is not None and (last.text, last.finish_reason) == ("CDE", "length") and sequence.speak() is None


@pytest.mark.parametrize(("by_span", "together"), [(False, 2), (True, 5)])
def test_under_a_mask_prompts_that_read_the_cache_together_stay_within_a_busy_step(
    by_span: bool, together: int
) -> None:
    book = scheduler(slots=6, kept=2, prefill_tokens=32, idle_tokens=1000, by_span=by_span)
    first = tuple(range(200))
    book.put("first", prompt=first, new=1)
    step(book)
    for name in range(5):
        book.put(str(name), prompt=(*first, *range(1000 * (name + 1), 1000 * (name + 1) + 15)), new=9)
    plan = book.plan(last=False)
    assert [(admission.shared, len(admission.tokens)) for admission in plan.admit] == [(200, 15)] * together


def test_a_large_step_without_memory_is_tried_in_halves_and_then_one_by_one() -> None:
    book = scheduler(slots=8, prefill_tokens=40, idle_tokens=160)
    for name in range(8):
        book.put(str(name), prompt=20, new=9)
    sizes = []
    for _ in range(4):
        plan = book.plan(last=False)
        sizes.append(len(plan.admit))
        assert book.take_back(plan) is None or len(plan.admit) == 1
    assert sizes == [8, 4, 2, 1]


def test_a_step_without_a_free_row_looks_at_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits: 46 ms a step were spent so at 256 rows of 8k tokens."""
    looked: list[str] = []
    computed = Sequence.computed.fget
    assert computed is not None
    monkeypatch.setattr(
        Sequence, "computed", property(lambda self: looked.append(self.request.request_id) or computed(self))
    )
    book = scheduler(2, kept=2)
    for name in "abc":
        book.put(name, prompt=100)
    step(book)
    looked.clear()
    step(book)
    assert looked == [] and book.waiting == 1
    book.cancel("a")
    step(book)
    assert looked == ["a", "b"], "one is kept, the other one may share"


def test_the_tokens_of_a_row_are_not_copied_for_each_look() -> None:
    book = scheduler(1, kept=1)
    book.put("a", prompt=100, new=900)
    (sequence,) = book.rows(book.plan(last=False))
    looks = []
    for token in range(300):
        sequence.accept(65 + token % 3, None)
        looks.append(sequence.computed)
        assert looks[-1].tolist() == [1] * 100 + [65 + one % 3 for one in range(token)]
    copies = [not np.shares_memory(*pair) for pair in itertools.pairwise(looks)]
    assert sum(copies) <= 3
    assert np.shares_memory(sequence.prompt, sequence.computed) and sequence.prompt.tolist() == [1] * 100
