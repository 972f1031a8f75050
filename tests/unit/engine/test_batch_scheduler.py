"""Rank 0's book of batches that run to completion: nobody joins a running one, nobody is lost, every batch fits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.core.request import GenerationRequest
from dsserve.engine.batch_scheduler import BatchScheduler
from dsserve.engine.scheduler import Step
from dsserve.engine.sequence import Sequence
from dsserve.sampling.sampler import SamplingState
from tests.unit.engine.test_scheduler import EOS, Letters, names

TOKENS = 20


def put(book: BatchScheduler, name: str, prompt: int = 3, new: int = 2) -> None:
    request = GenerationRequest(name, (1,) * prompt, new)
    book.add(Sequence(request, Letters(), SamplingState(request), frozenset({EOS})))  # type: ignore[arg-type]


def play(book: BatchScheduler, step: Step | None = None) -> list[str]:
    """Names of the sequences that got a token; those at their length leave."""
    rows = (step or book.plan()).rows
    for sequence in rows:
        event = sequence.accept(65, None)
        if event is not None and event.is_last:
            book.end(sequence)
    return names(rows)


def begins(step: Step) -> list[bool]:
    return [segment.start == 0 for segment in step.plan.segments]


def test_what_waits_forms_the_next_batch_when_the_last_has_ended() -> None:
    book = BatchScheduler(2, TOKENS)
    for name in "abc":
        put(book, name)
    assert play(book) == ["a", "b"]
    put(book, "d")
    assert play(book) == ["a", "b"]  # their second and last token
    assert book.running == 0 and book.waiting == 2
    plan = book.plan(last=True)
    assert begins(plan) == [True, True] and plan.plan.last
    assert [len(segment.tokens) for segment in plan.plan.segments] == [3, 3]
    assert play(book, plan) == ["c", "d"]


def test_prompts_and_outputs_that_do_not_fit_beside_each_other_take_turns() -> None:
    book = BatchScheduler(4, TOKENS)
    put(book, "long prompt", prompt=17, new=2)
    put(book, "long output", prompt=2, new=17)
    put(book, "short", prompt=2, new=2)
    assert play(book) == ["long prompt", "short"]
    play(book)
    assert play(book) == ["long output"]


def test_a_client_that_left_frees_its_place_in_the_book_at_once() -> None:
    book = BatchScheduler(2, TOKENS)
    put(book, "a", new=5)
    put(book, "b", new=5)
    play(book)
    assert [s.request.request_id for s in book.cancel("a")] == ["a"] and book.running == 1
    put(book, "c")
    plan = book.plan()
    assert begins(plan) == [False] and plan.plan.total == 1
    assert play(book, plan) == ["b"]
    book.cancel("b")
    assert play(book) == ["c"]


def test_a_batch_that_memory_refused_is_tried_one_by_one() -> None:
    book = BatchScheduler(3, TOKENS)
    for name in "abc":
        put(book, name)
    refused = book.plan()
    book.undo(refused)
    book.plan_less(refused)
    assert book.running == 0 and book.waiting == 3
    order = []
    while book.has_work:
        order.append(play(book))
    assert order == [["a"], ["a"], ["b"], ["b"], ["c"], ["c"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=12), st.integers(1, 4))
def test_every_batch_fits_and_every_sequence_gets_its_tokens(sizes: list[tuple[int, int]], slots: int) -> None:
    book = BatchScheduler(slots, TOKENS)
    for index, (prompt, new) in enumerate(sizes):
        put(book, str(index), prompt, new)
    counts = dict.fromkeys(map(str, range(len(sizes))), 0)
    while book.has_work:
        plan = book.plan()
        batch = [sizes[int(sequence.request.request_id)] for sequence in plan.rows]
        if any(begins(plan)):
            assert all(begins(plan))
            assert len(batch) <= slots
            assert max(prompt for prompt, _ in batch) + max(new for _, new in batch) <= TOKENS
        for name in play(book, plan):
            counts[name] += 1
    assert counts == {str(index): new for index, (_, new) in enumerate(sizes)}


def test_a_prompt_that_has_no_memory_alone_is_given_up() -> None:
    book = BatchScheduler(2, TOKENS)
    put(book, "a")
    plan = book.plan()
    book.undo(plan)
    failed = book.give_up(plan)
    assert failed is not None and names([failed]) == ["a"] and not book.has_work


def test_the_kernels_get_no_step_ahead_and_no_pages() -> None:
    book = BatchScheduler(2, TOKENS)
    put(book, "a")
    plan = book.plan()
    assert book.plan_ahead({text: place for place, text in enumerate(plan.rows)}) is None
    assert book.kv.usage == 0.5, "a page is a row"
