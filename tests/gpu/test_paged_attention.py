"""The Triton kernels over pages against attention in fp64, over block tables whose pages lie in random order.

Every cell that no text holds is NaN: a kernel that lets one of them count gives NaN.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from dsserve.attention.backend import read_cells
from dsserve.attention.triton_pages import LONG, TritonAttention
from dsserve.core.step_input import StepInput, decode_length, padded_length
from dsserve.core.step_plan import Segment, StepPlan
from dsserve.kv.block_tables import BlockTables

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
PAGE = 16
# ||out - ref|| / ||ref|| of one token, all heads; fp32: the rounding of sums of 10,000 products.
LIMIT = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
FP32, FP16, BF16 = LIMIT
# Width of a head, query heads that share a KV head, KV heads: every width in every dtype, every group too.
CASES = [
    (64, 1, 4, FP32), (80, 3, 2, FP32), (96, 4, 1, FP32), (128, 7, 1, FP32), (256, 8, 1, FP32),
    (64, 3, 3, FP16), (80, 4, 2, FP16), (96, 7, 1, FP16), (128, 8, 1, FP16), (256, 1, 3, FP16),
    (64, 7, 2, BF16), (80, 8, 1, BF16), (96, 1, 4, BF16), (128, 4, 8, BF16), (256, 3, 2, BF16),
]  # fmt: skip
SHORT = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300)
# (tokens before, tokens of the segment); those of one token first.
SEGMENTS = {
    "whole": [(0, 1), (0, 16), (0, 17), (0, 63), (0, 200), (0, 2)],
    "parts": [(1, 2), (15, 1 + PAGE), (64, 64), (100, 129), (9000, 1000)],
    "mixed": [(0, 1), (63, 1), (64, 1), (9999, 1), (0, 5), (700, 300), (16, 16), (9990, 10)],
    "one": [(4095, 513)],
    "decoded": [(length - 1, 1) for length in SHORT],
}


@dataclass
class Texts:
    """Texts of some lengths in a cache that holds some more pages.

    Attributes:
        keys, values: `[cells, KV, D]`.
        tables: the last row is the padding's.
    """

    lengths: list[int]
    keys: torch.Tensor
    values: torch.Tensor
    tables: BlockTables

    @classmethod
    def draw(cls, lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cuda") -> Texts:
        generator = torch.Generator().manual_seed(len(lengths))
        tables = BlockTables(len(lengths), max(lengths), PAGE, torch.device(device))
        counts = [-(-length // PAGE) for length in lengths]
        pages = (torch.randperm(sum(counts) + 9, generator=generator)[: sum(counts)] + 1).to(torch.int32)
        cells = (sum(counts) + 10) * PAGE
        keys, values = torch.full((2, cells, kv_heads, dim), float("nan"), dtype=dtype, device=device)
        for row, own in enumerate(pages.split(counts)):
            tables.table[row, : len(own)] = own.to(device)
            at = cls.cells_of(tables, row, lengths[row])
            keys[at], values[at] = torch.randn(2, lengths[row], kv_heads, dim, generator=generator).to(keys)
        return cls(lengths, keys, values, tables)

    @staticmethod
    def cells_of(tables: BlockTables, row: int, length: int) -> torch.Tensor:
        positions = torch.arange(length, device=tables.table.device)
        return tables.cells(torch.full_like(positions, row), positions)

    def attend(self, row: int, query: torch.Tensor, length: int) -> torch.Tensor:
        """The last tokens `[T, H, D]` of a text's first `length` ones, in fp64."""
        at = self.cells_of(self.tables, row, length)
        group = query.shape[1] // self.keys.shape[1]
        keys, values = (stored[at].double().repeat_interleave(group, 1) for stored in (self.keys, self.values))
        scores = torch.einsum("thd,shd->hts", query.double(), keys) * query.shape[2] ** -0.5
        seen = torch.ones(len(query), length, dtype=torch.bool, device=query.device).tril(length - len(query))
        return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)


def draw_query(tokens: int, heads: int, kv_heads: int, like: torch.Tensor) -> torch.Tensor:
    """`[T, H, D]`, as a matmul of q, k and v gives it: rows lie further apart."""
    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randn(tokens, heads + 2 * kv_heads, like.shape[-1], generator=generator).to(like)
    return whole[:, :heads]


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Each token `[T, H, D]`, the least of them too: a long text's average is small beside a short one's."""
    error = (found.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < LIMIT[dtype], f"token {int(error.argmax())}"


@pytest.fixture(scope="module")
def compiled() -> None:
    """Triton's cache of what the cases need, compiled at once: one after the other that takes minutes, fp32 most."""
    with ProcessPoolExecutor(len(CASES), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, CASES))


def _compile(case: tuple[int, int, int, torch.dtype]) -> None:
    for test in (test_decoded_tokens_are_as_in_fp64, test_segments_are_as_in_fp64):
        with suppress(Exception):  # the test itself says what is wrong
            test(*case)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("dim", "group", "kv_heads", "dtype"), CASES)
def test_decoded_tokens_are_as_in_fp64(dim: int, group: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Short texts beside a long one, whole and in parts, more parts than some texts have tiles of keys too."""
    from dsserve.attention.paged_triton import decode

    texts = Texts.draw([*SHORT, 10_000, *SHORT], kv_heads, dim, dtype)
    query = draw_query(len(texts.lengths), kv_heads * group, kv_heads, texts.keys)
    order = torch.randperm(len(texts.lengths), generator=torch.Generator().manual_seed(2))
    rows, lengths = order.cuda(), torch.tensor(texts.lengths)[order].cuda()
    pairs = zip(order.tolist(), query[:, None], strict=True)
    expected = torch.cat([texts.attend(row, one, texts.lengths[row]) for row, one in pairs])
    for parts in (1, 3, 264):
        found = decode(query, texts.keys, texts.values, texts.tables.table, rows, lengths, PAGE, parts, dim**-0.5)
        assert_near(found, expected, dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("dim", "group", "kv_heads", "dtype"), CASES)
def test_segments_are_as_in_fp64(dim: int, group: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Prompts, parts of them and decoded tokens; then the same with padding, tokens and segments, as graphs have it."""
    from dsserve.attention.paged_triton import read_segments

    for name, segments in SEGMENTS.items():
        texts = Texts.draw([start + size for start, size in segments], kv_heads, dim, dtype)
        sizes = [size for _, size in segments]
        query = draw_query(sum(sizes) + 37, kv_heads * group, kv_heads, texts.keys)
        parts = query.split([*sizes, 37])
        expected = torch.cat([texts.attend(row, parts[row], texts.lengths[row]) for row in range(len(sizes))])
        for padding, more in ((0, 0), (37, 0), (37, 6)):
            rows = torch.tensor([*range(len(sizes)), *[texts.tables.padding] * more]).cuda()
            starts = torch.tensor([0, *sizes, *[0] * more]).cumsum(0).cuda()
            lengths = torch.tensor([*texts.lengths, *[0] * more]).cuda()
            tensors = texts.keys, texts.values, texts.tables.table, rows, starts, lengths
            found = read_segments(query[: sum(sizes) + padding], *tensors, PAGE, dim**-0.5)
            assert not found[sum(sizes) :].any(), f"{name}: padding"
            assert_near(found[: sum(sizes)], expected, dtype)


def test_a_row_of_padding_changes_no_other() -> None:
    """A captured step has more rows than texts: the others read one cell of page 0."""
    from dsserve.attention.paged_triton import decode

    texts = Texts.draw([5, 70, 4097], 2, 64, torch.float16)
    query = draw_query(8, 8, 2, texts.keys)
    rows = torch.tensor([0, 1, 2, *[texts.tables.padding] * 5]).cuda()
    lengths = torch.tensor([*texts.lengths, *[1] * 5]).cuda()
    expected = torch.cat([texts.attend(row, query[row : row + 1], texts.lengths[row]) for row in range(3)])
    for parts in (1, 17, 32):
        found = decode(query, texts.keys, texts.values, texts.tables.table, rows, lengths, PAGE, parts, 64**-0.5)
        assert_near(found[:3], expected, torch.float16)


@pytest.mark.parametrize("longest", [LONG - 1, LONG, LONG + 1, 10_000])
@pytest.mark.parametrize("count", [1, 40, 300])
@pytest.mark.parametrize("reads", [False, True], ids=["decodes", "reads a prompt, too"])
def test_what_a_step_describes_is_attended(count: int, longest: int, reads: bool) -> None:
    """Through the layer that a model calls, padded as an uncaptured pass is: many short texts beside a long one, split
    where it is long."""
    texts = Texts.draw([*(1 + 7 * row % 50 for row in range(count)), longest, 90], 2, 64, torch.bfloat16)
    sizes = [1] * (count + 1) + [40] * reads
    segments = [Segment(row, texts.lengths[row] - size, (0,) * size) for row, size in enumerate(sizes)]
    attention = TritonAttention(texts.tables, texts.keys.device)
    meta = attention.describe(StepInput.of(StepPlan(tuple(segments))))
    assert meta.is_long == (longest > LONG and not reads) and (meta.starts is None) == (not reads)
    total = sum(sizes)
    padded = padded_length(total) if reads else decode_length(total)
    query = draw_query(padded, 8, 2, texts.keys)
    stored = read_cells(texts.keys), read_cells(texts.values)
    found = attention.attend(nn.Identity(), query.transpose(0, 1)[None], *stored, 64**-0.5, meta)
    assert len(found) == padded and not found[total:].any()
    parts = query[:total].split(sizes)
    expected = torch.cat([texts.attend(row, parts[row], texts.lengths[row]) for row in range(len(sizes))])
    assert_near(found[:total], expected, torch.bfloat16)
