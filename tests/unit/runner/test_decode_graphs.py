"""Which sizes of a decode step are captured; the graphs themselves are tested in tests/gpu."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dsserve.kernels.cuda_graph import buckets
from dsserve.runner.decode_graphs import pad_rows


@given(first=st.integers(1, 300), more=st.integers(0, 100_000))
def test_every_size_has_a_bucket_that_wastes_at_most_half(first: int, more: int) -> None:
    last = first + more
    sizes = buckets(first, last)
    assert sizes[0] == first and sizes[-1] == last and sizes == sorted(set(sizes))
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))


def test_examples() -> None:
    assert buckets(1, 16) == [1, 2, 4, 8, 16]
    assert buckets(1, 1) == [1]
    assert buckets(128, 3000) == [128, 256, 512, 1024, 2048, 3000]


def test_rows_beyond_the_decoded_ones_write_where_it_is_overwritten() -> None:
    """A free row at its beginning, a row with a part of a prompt behind that part."""
    assert pad_rows((7, 8), [3, 4], 2) == [[7, 8], [3, 4]]
    assert pad_rows((7, 8, 9), [3, 4, 5, 256], 4) == [[7, 8, 9, 0], [3, 4, 5, 256]]
    assert pad_rows((7, 8, 9), [3, 4, 5], 4) == [[7, 8, 9, 0], [3, 4, 5, 0]]
    assert pad_rows((7, 8), [3, 4, 256], 2) == [[7, 8], [3, 4]]
    assert pad_rows((7,) * 5, [1, 2, 3, 4, 5, 256], 8) == [[7] * 5 + [0] * 3, [1, 2, 3, 4, 5, 256, 0, 0]]
