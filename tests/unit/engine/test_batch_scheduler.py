"""Rank 0's book of batches that run to completion: nobody joins a running one, nobody is lost, every batch fits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.core.request import GenerationRequest
from dsserve.core.step_plan import Plan
from dsserve.engine.batch_scheduler import BatchScheduler
from dsserve.engine.sequence import Sequence
from dsserve.sampling.sampler import SamplingState
from tests.unit.engine.test_scheduler import EOS, Letters

TOKENS = 20


def put(book: BatchScheduler, name: str, prompt: int = 3, new: int = 2) -> None:
    request = GenerationRequest(name, (1,) * prompt, new)
    book.add(Sequence(request, Letters(), SamplingState(request), frozenset({EOS})))  # type: ignore[arg-type]


def step(book: BatchScheduler, plan: Plan | None = None) -> list[str]:
    """Names of the sequences that got a token; those at their length leave."""
    names = []
    for sequence in book.rows(plan or book.plan(last=False)):
        names.append(sequence.request.request_id)
        if sequence.accept(65, None).is_last:
            book.end(sequence)
    return names


def test_what_waits_forms_the_next_batch_when_the_last_has_ended() -> None:
    book = BatchScheduler(2, TOKENS)
    for name in "abc":
        put(book, name)
    assert step(book) == ["a", "b"]
    put(book, "d")
    assert step(book) == ["a", "b"]  # their second and last token
    assert book.running == 0 and book.waiting == 2
    plan = book.plan(last=True)
    assert len(plan.evict) == 2 and len(plan.admit) == 2 and not plan.tokens and not plan.keep
    assert step(book, plan) == ["c", "d"]


def test_prompts_and_outputs_that_do_not_fit_beside_each_other_take_turns() -> None:
    book = BatchScheduler(4, TOKENS)
    put(book, "long prompt", prompt=17, new=2)
    put(book, "long output", prompt=2, new=17)
    put(book, "short", prompt=2, new=2)
    assert step(book) == ["long prompt", "short"]
    step(book)
    assert step(book) == ["long output"]


def test_a_client_that_left_frees_its_place_in_the_book_at_once() -> None:
    book = BatchScheduler(2, TOKENS)
    put(book, "a", new=5)
    put(book, "b", new=5)
    step(book)
    assert [s.request.request_id for s in book.cancel("a")] == ["a"] and book.running == 1
    put(book, "c")
    plan = book.plan(last=False)
    assert plan.evict == (0,) and len(plan.tokens) == 1 and not plan.admit
    assert step(book, plan) == ["b"]
    book.cancel("b")
    assert step(book) == ["c"]


def test_a_batch_that_memory_refused_is_tried_one_by_one() -> None:
    book = BatchScheduler(3, TOKENS)
    for name in "abc":
        put(book, name)
    assert book.take_back(book.plan(last=False)) is None
    order = []
    while book.has_work:
        order.append(step(book))
    assert order == [["a"], ["a"], ["b"], ["b"], ["c"], ["c"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=12), st.integers(1, 4))
def test_every_batch_fits_and_every_sequence_gets_its_tokens(sizes: list[tuple[int, int]], slots: int) -> None:
    book = BatchScheduler(slots, TOKENS)
    for index, (prompt, new) in enumerate(sizes):
        put(book, str(index), prompt, new)
    counts = dict.fromkeys(map(str, range(len(sizes))), 0)
    while book.has_work:
        plan = book.plan(last=False)
        batch = [sizes[int(sequence.request.request_id)] for sequence in book.rows(plan)]
        if plan.admit:
            assert len(batch) <= slots
            assert max(prompt for prompt, _ in batch) + max(new for _, new in batch) <= TOKENS
        for name in step(book, plan):
            counts[name] += 1
    assert counts == {str(index): new for index, (_, new) in enumerate(sizes)}
