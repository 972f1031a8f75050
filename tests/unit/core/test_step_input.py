"""A plan as tensors: every token has its place, its position and its row."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsserve.core.step_input import EXACT_ROWS, PREFILL_BUCKETS, StepInput, decode_length, padded_length
from dsserve.core.step_plan import Segment, StepPlan, Wanted

PLAN = StepPlan(
    (
        Segment(4, 30, (0,), source=2),
        Segment(0, 7, (11,)),
        Segment(2, 0, (21, 22, 23), wanted=Wanted.NOTHING),
        Segment(1, 5, (31, 32), wanted=Wanted.NEXT | Wanted.ALL),
    )
)


def test_tokens_lie_one_behind_the_other() -> None:
    step = StepInput.of(PLAN)
    assert step.tokens.tolist() == [0, 11, 21, 22, 23, 31, 32]
    assert step.positions.tolist() == [30, 7, 0, 1, 2, 5, 6]
    assert step.rows.tolist() == [4, 0, 2, 1] and step.token_rows.tolist() == [4, 0, 2, 2, 2, 1, 1]
    assert step.starts.tolist() == [0, 1, 2, 5, 7] and step.sizes.tolist() == [1, 1, 3, 2]
    assert step.lengths.tolist() == [31, 8, 3, 7] and step.total == 7
    assert (step.decoded, step.fresh) == (2, False)
    assert step.wanted.tolist() == [0, 1, 5, 6] and step.sources.tolist() == [[0, 2]]


segments = st.builds(
    lambda row, start, size, wanted, source: Segment(row, start, tuple(range(size)), wanted=wanted, source=source),
    st.integers(0, 9), st.integers(0, 50), st.integers(1, 9), st.integers(0, 3), st.integers(-1, 5),
)  # fmt: skip


@given(st.lists(segments, min_size=1, max_size=8))
def test_it_is_what_the_segments_say(found: list[Segment]) -> None:
    plan = StepPlan(tuple(sorted(found, key=lambda segment: len(segment.tokens) > 1)))
    step = StepInput.of(plan)
    each = [(s, place) for s in plan.segments for place in range(len(s.tokens))]
    assert step.positions.tolist() == [segment.start + place for segment, place in each]
    assert step.token_rows.tolist() == [segment.row for segment, _ in each]
    wanted = [
        number for number, (s, place) in enumerate(each)
        if s.wanted & Wanted.ALL or (s.wanted and place == len(s.tokens) - 1)
    ]  # fmt: skip
    assert step.wanted.tolist() == wanted
    assert step.decoded == sum(len(segment.tokens) == 1 for segment in plan.segments)
    assert step.fresh == all(segment.start == 0 for segment in plan.segments)
    sources = [(number, s.source) for number, (s, place) in enumerate(each) if place == 0 and s.source >= 0]
    assert step.sources.tolist() == [list(pair) for pair in sources]
    assert all(array.dtype == np.int64 for array in (step.tokens, step.positions, step.rows, step.starts, step.wanted))


@given(st.integers(1, 20_000))
def test_padding_is_bounded_and_shapes_are_few(length: int) -> None:
    padded, decoded = padded_length(length), decode_length(length)
    assert padded >= length and padded_length(padded) == padded
    assert padded - length < max(16, PREFILL_BUCKETS[-1] // 2) and padded in (*PREFILL_BUCKETS, padded // 256 * 256)
    assert decoded == length if length <= EXACT_ROWS else length <= decoded < length + 4


def test_longer_passes_are_never_padded_to_less() -> None:
    lengths = [padded_length(length) for length in range(1, 3000)]
    assert all(one <= other for one, other in itertools.pairwise(lengths))
