"""How the LM head's rows are dealt out to ranks that carry different loads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsserve.vocab_head import balance


@given(
    rows=st.integers(1, 5000),
    row_bytes=st.integers(1, 2000),
    loads=st.lists(st.integers(0, 5_000_000), min_size=1, max_size=8),
)
def test_every_row_has_one_rank_and_no_rank_is_overloaded(rows: int, row_bytes: int, loads: list[int]) -> None:
    counts = balance(rows, row_bytes, loads)
    assert sum(counts) == rows and min(counts) >= 0
    totals = [load + count * row_bytes for load, count in zip(loads, counts, strict=True)]
    block = 64 * row_bytes
    # A rank that got rows is at most one block above any other.
    assert all(total - min(totals) <= block for total, count in zip(totals, counts, strict=True) if count)


def test_smollm2_is_even_on_two_ranks() -> None:
    """Bytes of a step beside the head, bf16, 6 + 2 and 3 + 1 heads: the lighter rank takes two thirds of the rows."""
    hidden, layers, mlp = 576, 30, 3 * 576 * 768
    loads = [2 * layers * (hidden * 64 * (2 * q + 2 * kv) + mlp) for q, kv in ((6, 2), (3, 1))]
    counts = balance(49152, 2 * hidden, loads)
    totals = [load + count * 2 * hidden for load, count in zip(loads, counts, strict=True)]
    assert max(totals) / min(totals) < 1.001
    assert 1.8 < counts[1] / counts[0] < 2.0
