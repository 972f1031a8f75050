"""How the LM head's rows are split over the ranks."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dsserve.parallel.vocab_head import split_evenly


@given(rows=st.integers(1, 200_000), world_size=st.integers(1, 16))
def test_every_row_has_one_rank_and_sizes_are_even(rows: int, world_size: int) -> None:
    parts = [split_evenly(rows, rank, world_size) for rank in range(world_size)]
    assert parts[0][0] == 0 and parts[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1
