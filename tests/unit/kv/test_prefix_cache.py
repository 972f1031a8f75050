"""Prompts take over what live and kept rows have in common with them, and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.core.request import GenerationRequest
from dsserve.core.step_plan import Plan
from dsserve.engine.scheduler import WORTH_A_STEP, Scheduler
from dsserve.engine.sequence import Sequence
from dsserve.kv.prefix_cache import SHORTEST, Hit, PrefixCache, common_length
from dsserve.sampling.sampler import SamplingState
from tests.unit.engine.test_scheduler import Letters

LONG = list(range(100))


def test_the_longest_common_beginning_wins_and_the_last_token_is_always_computed() -> None:
    cache = PrefixCache(first=4, size=2)
    kept = cache.keep(LONG[:50])
    assert kept in (4, 5)
    assert cache.find(LONG, [(0, LONG[:30]), (1, [7, *LONG])]) == Hit(kept, 50)
    assert cache.find(LONG, [(0, LONG[:80])]) == Hit(0, 80)
    assert cache.find(LONG[:50], []) == Hit(kept, 49)


def test_short_beginnings_are_not_worth_it() -> None:
    cache = PrefixCache(4, 2)
    assert cache.keep(LONG[: SHORTEST - 1]) is None
    assert cache.find(LONG[:SHORTEST], [(0, LONG)]) is None
    assert cache.find(LONG, [(0, [*LONG[: SHORTEST - 1], 999])]) is None


def test_turns_of_one_conversation_take_one_row_and_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(4, 2)
    first = cache.keep(LONG[:40])
    assert cache.keep(LONG[:60]) == first  # continues it
    assert cache.keep(LONG[:20]) is None  # is part of it
    other = [1000 + token for token in LONG]
    assert cache.keep(other) not in (first, None)
    assert cache.find(LONG, []) == Hit(first, 60)  # used: the other one is the oldest now
    third = [2000 + token for token in LONG]
    cache.keep(third)
    assert cache.find(other, []) is None and cache.find(LONG, []) is not None


def test_without_rows_nothing_is_shared() -> None:
    cache = PrefixCache(4, 0)
    assert cache.keep(LONG) is None and cache.find(LONG, [(0, LONG)]) is None


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_common_length_is_what_it_says(first: list[int], second: list[int]) -> None:
    length = common_length(np.array(first, dtype=np.int64), np.array(second, dtype=np.int64))
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


class Rows:
    """What the ranks' caches hold after each plan: the tokens whose keys and values lie in each row."""

    def __init__(self, slots: int, kept: int) -> None:
        self.live: list[list[int]] = []
        self.kept: dict[int, list[int]] = {slots + row: [] for row in range(kept)}

    def execute(self, plan: Plan) -> None:
        for row, copy in plan.keep:
            self.kept[copy] = list(self.live[row])
        for row in plan.evict:
            last = self.live.pop()
            if row < len(self.live):
                self.live[row] = last
        for row, token in enumerate(plan.tokens):
            self.live[row].append(token)
        for admission in plan.admit:
            held = self.kept.get(admission.source) or [*self.live, []][admission.source]
            begun = held[: admission.shared]
            assert len(begun) == admission.shared
            self.live.append([*begun, *admission.tokens])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 6)), max_size=30), st.integers(0, 3))
def test_every_row_ends_up_with_its_own_prompt(requests: list[tuple[int, int, int]], kept: int) -> None:
    """Prompts are beginnings of three families, so that hits, evictions and overwritten rows all happen."""
    book, rows = Scheduler(3, PrefixCache(3, kept)), Rows(3, kept)
    waiting = list(requests)
    while waiting or book.has_work:
        for family, length, new in waiting[:2]:
            prompt = tuple(100 * family + token for token in range(length))
            request = GenerationRequest("r", prompt, new)
            book.add(Sequence(request, Letters(), SamplingState(request), frozenset()))  # type: ignore[arg-type]
        waiting = waiting[2:]
        plan = book.plan(last=False)
        rows.execute(plan)
        sequences = book.rows(plan)
        for row, sequence in enumerate(sequences):
            assert rows.live[row] == [*sequence.request.prompt_ids, *sequence._generated]
            if sequence.accept(50, None).is_last:
                book.end(sequence)


def test_a_prompt_waits_a_step_where_it_can_take_most_of_itself_from_a_neighbour() -> None:
    book = Scheduler(4, PrefixCache(4, 1))
    for name in "ab":
        request = GenerationRequest(name, tuple(range(WORTH_A_STEP + 20)), 5)
        book.add(Sequence(request, Letters(), SamplingState(request), frozenset()))  # type: ignore[arg-type]
    first = book.plan(last=False)
    assert [admission.shared for admission in first.admit] == [0]
    for sequence in book.rows(first):
        sequence.accept(50, None)
    second = book.plan(last=False)
    assert [(a.source, a.shared, len(a.tokens)) for a in second.admit] == [(0, WORTH_A_STEP + 19, 1)]
