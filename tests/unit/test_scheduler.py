"""Rank 0's book: rows stay dense, nobody is lost, every text ends once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.generation.prefix_cache import PrefixCache
from dsserve.generation.request import GenerationRequest, TokenEvent
from dsserve.generation.sampler import SamplingState
from dsserve.generation.scheduler import PREFILL_TOKENS_A_STEP, Scheduler
from dsserve.generation.sequence import Sequence

EOS = 0


class Letters:
    """A detokenizer for tests: token n is one letter, `!` (token 33) is a stop string."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        self.stopped = token == 33
        return "" if self.stopped else chr(token)

    def flush(self) -> str:
        return ""


class Book(Scheduler):
    """A scheduler that takes requests, and tokens in the engine's place."""

    def put(self, name: str, prompt: int = 3, new: int = 5) -> None:
        request = GenerationRequest(name, (1,) * prompt, new)
        self.add(Sequence(request, Letters(), SamplingState(request), frozenset({EOS})))  # type: ignore[arg-type]

    def enter(self, sequence: Sequence, token: int) -> TokenEvent:
        event = sequence.accept(token, None)
        if event.is_last:
            self.end(sequence)
        return event


def scheduler(slots: int = 4, kept: int = 0) -> Book:
    return Book(slots, PrefixCache(slots, kept))


def step(book: Book, token: int = 65) -> list[TokenEvent]:
    return [book.enter(sequence, token) for sequence in book.rows(book.plan(last=False))]


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


def test_a_burst_of_long_prompts_is_spread_over_steps_and_a_huge_one_still_starts() -> None:
    book = scheduler()
    for name in "abc":
        book.put(name, prompt=PREFILL_TOKENS_A_STEP // 2)
    assert len(step(book)) == 2
    plan = book.plan(last=False)
    assert (len(plan.tokens), len(plan.admit)) == (2, 1)
    book = scheduler()
    book.put("huge", prompt=PREFILL_TOKENS_A_STEP * 3)
    assert len(book.plan(last=False).admit) == 1


operations = st.lists(st.tuples(st.sampled_from(["add", "cancel", "step"]), st.integers(0, 30)), max_size=80)


@settings(max_examples=200)
@given(operations)
def test_rows_stay_dense_and_every_request_ends_once_or_was_cancelled(script: list[tuple[str, int]]) -> None:
    book, slots, names, cancelled, ended = scheduler(4), [], [], set(), []
    for action, number in [*script, *[("step", 0)] * 200]:
        if action == "add":
            names.append(f"r{len(names)}")
            book.put(names[-1], new=1 + number % 7)
        elif action == "cancel" and names:
            cancelled.add(names[number % len(names)])
            book.cancel(names[number % len(names)])
        else:
            plan = book.plan(last=False)
            for row in plan.evict:  # what every rank does with its rows
                last = slots.pop()
                if row < len(slots):
                    slots[row] = last
            rows = book.rows(plan)
            assert [s.request.request_id for s in rows[: len(plan.tokens)]] == slots
            slots = [s.request.request_id for s in rows]
            assert len(slots) == len(plan.tokens) + len(plan.admit) == book.running <= 4
            events = [book.enter(s, 65) for s in rows]
            ended += [event.request_id for event in events if event.finish_reason]
    assert not book.has_work
    assert len(ended) == len(set(ended))
    assert set(names) == set(ended) | cancelled
