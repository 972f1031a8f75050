"""The Triton kernels of `triton_pages`. Imported on first use only, where Triton is installed."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsserve.kernels import pdl
from dsserve.kernels.pdl import wait_for_inputs

_LEAST_HEADS = 16  # rows of the smallest matrix product
TILE = 64  # keys that a program reads at a time
_QUERIES = 64  # query rows (tokens x heads that share a KV head) of a program that reads prompts


@triton.jit
def _find_cells(table_ptr, row, table_row, tokens, is_token, PAGE: tl.constexpr):
    """Cells of a text's tokens."""
    page = tl.load(table_ptr + row * table_row + tokens // PAGE, mask=is_token, other=0).to(tl.int64)
    return page * PAGE + tokens % PAGE


@triton.jit
def _decode_part(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lengths_ptr, sums_ptr, best_ptr, total_ptr, out_ptr, scale,
    q_token, q_head, cell_size, head_size, table_row, parts,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token, one KV head, one part of its text: unnormalized sums, the best score and the total of weights; where a
    text is not split, the result."""
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, dims = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD)
    is_head, is_dim = heads < GROUP, dims < DIM
    wait_for_inputs(EARLY)
    length, row = tl.load(lengths_ptr + token).to(tl.int32), tl.load(rows_ptr + token)
    chunk = tl.cdiv(tl.cdiv(length, TILE), parts) * TILE
    first, end = part * chunk, tl.minimum(part * chunk + chunk, length)
    if first < length:
        q_at = token * q_token + (head * GROUP + heads)[:, None] * q_head + dims[None, :]
        query = tl.load(q_ptr + q_at, mask=is_head[:, None] & is_dim[None, :], other=0.0)
        best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        sums = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
        for start in range(first, end, TILE):
            tokens = start + tl.arange(0, TILE)
            is_token = tokens < end
            at = _find_cells(table_ptr, row, table_row, tokens, is_token, PAGE) * cell_size + head * head_size
            keys = tl.load(k_ptr + at[None, :] + dims[:, None], mask=is_dim[:, None] & is_token[None, :], other=0.0)
            scores = tl.dot(query, keys, input_precision="ieee") * scale
            scores = tl.where(is_token[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - new_best[:, None])
            shrink = tl.exp(best - new_best)
            values = tl.load(v_ptr + at[:, None] + dims[None, :], mask=is_token[:, None] & is_dim[None, :], other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            total = total * shrink + tl.sum(weights, 1)
            best = new_best
        place = (token * tl.num_programs(1) + head) * GROUP + heads
        is_out = is_head[:, None] & is_dim[None, :]
        if SPLIT:
            place = place * parts + part
            tl.store(best_ptr + place, best, mask=is_head)
            tl.store(total_ptr + place, total, mask=is_head)
            tl.store(sums_ptr + place[:, None] * DIM + dims[None, :], sums, mask=is_out)
        else:
            result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + place[:, None] * DIM + dims[None, :], result, mask=is_out)


@triton.jit
def _join_parts(
    sums_ptr, best_ptr, total_ptr, lengths_ptr, out_ptr, heads, parts,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PARTS_PAD: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one token: its parts, weighted by how far their best scores lie below the best of all."""
    head = tl.program_id(0)
    each, dims = tl.arange(0, PARTS_PAD), tl.arange(0, DIM_PAD)
    wait_for_inputs(EARLY)
    length = tl.load(lengths_ptr + head // heads).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, TILE), parts) * TILE
    is_part, is_dim = (each < parts) & (each * chunk < length), dims < DIM
    best = tl.load(best_ptr + head * parts + each, mask=is_part, other=float("-inf"))
    weight = tl.exp(best - tl.max(best, 0))
    total = tl.load(total_ptr + head * parts + each, mask=is_part, other=0.0)
    at = (head * parts + each)[:, None] * DIM + dims[None, :]
    sums = tl.load(sums_ptr + at, mask=is_part[:, None] & is_dim[None, :], other=0.0)
    result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + head * DIM + dims, result.to(out_ptr.dtype.element_ty), mask=is_dim)


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    page_tokens: int,
    parts: int,
    scale: float,
) -> torch.Tensor:
    """Attention of n tokens, each over its row's first `length` tokens.

    Args:
        query: `[T, H, D]`; tokens after the n first are padding.
        keys, values: `[cells, KV, D]`, contiguous.
        table: `[rows, pages]`, int32.
        rows, lengths: `[n]`, int64.
        parts: a text is read by so many programs at most (flash-decoding, Dao et al. 2023).

    Returns:
        `[T, H, D]`, zeros for padding.
    """
    total, heads, dim = query.shape
    count = rows.shape[0]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    splits = (parts, dim) if parts > 1 else (0, 0)
    sums = torch.empty(count, heads, *splits, dtype=torch.float32, device=query.device)
    best = torch.empty(2, count, heads, splits[0], dtype=torch.float32, device=query.device)
    out = torch.empty(total, heads, dim, dtype=query.dtype, device=query.device)
    if count < total:
        out[count:].zero_()
    dim_pad, launch_early = triton.next_power_of_2(dim), pdl.options(query.device)
    _decode_part[count, kv_heads, parts](
        query, keys, values, table, rows, lengths, sums, best[0], best[1], out, scale,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), table.stride(0), parts,
        GROUP=group, GROUP_PAD=max(_LEAST_HEADS, triton.next_power_of_2(group)), DIM=dim, DIM_PAD=dim_pad, TILE=TILE,
        PAGE=page_tokens, SPLIT=parts > 1, **launch_early,
    )  # fmt: skip
    if parts > 1:
        _join_parts[(count * heads,)](
            sums, best[0], best[1], lengths, out, heads, parts, DIM=dim, DIM_PAD=dim_pad,
            PARTS_PAD=triton.next_power_of_2(parts), TILE=TILE, **launch_early,
        )  # fmt: skip
    return out


@triton.jit
def _find_segment(starts_ptr, tile, count, QUERIES: tl.constexpr):
    """The segment that a tile of queries belongs to: segment s has the tiles from starts[s] // QUERIES + s on."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(starts_ptr + middle).to(tl.int32) // QUERIES + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _read_tile(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, starts_ptr, lengths_ptr, out_ptr, scale,
    q_token, q_head, cell_size, head_size, table_row, out_token, count,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, LINES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some tokens of one segment, one KV head: LINES lines, of a token and a query head each."""
    tile, head = tl.program_id(0), tl.program_id(1)
    lines, dims = tl.arange(0, LINES), tl.arange(0, DIM_PAD)
    wait_for_inputs(EARLY)
    segment = _find_segment(starts_ptr, tile, count, QUERIES)
    begin, end = tl.load(starts_ptr + segment).to(tl.int32), tl.load(starts_ptr + segment + 1).to(tl.int32)
    first = begin + (tile - (begin // QUERIES + segment)) * QUERIES
    if first < end:
        row, length = tl.load(rows_ptr + segment), tl.load(lengths_ptr + segment).to(tl.int32)
        places = first + lines // GROUP  # of the tokens in the pass
        is_line, is_dim = (places < end) & (lines < QUERIES * GROUP), dims < DIM
        positions = places - end + length  # in the text
        heads = head * GROUP + lines % GROUP
        q_at = places[:, None].to(tl.int64) * q_token + heads[:, None] * q_head + dims[None, :]
        query = tl.load(q_ptr + q_at, mask=is_line[:, None] & is_dim[None, :], other=0.0)
        best = tl.full([LINES], float("-inf"), tl.float32)
        total = tl.zeros([LINES], tl.float32)
        sums = tl.zeros([LINES, DIM_PAD], tl.float32)
        seen = tl.minimum(first + QUERIES, end) - end + length  # keys of the last token
        for start in range(0, seen, TILE):
            tokens = start + tl.arange(0, TILE)
            is_token = tokens < seen
            at = _find_cells(table_ptr, row, table_row, tokens, is_token, PAGE) * cell_size + head * head_size
            keys = tl.load(k_ptr + at[None, :] + dims[:, None], mask=is_dim[:, None] & is_token[None, :], other=0.0)
            scores = tl.dot(query, keys, input_precision="ieee") * scale
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - new_best[:, None])
            shrink = tl.exp(best - new_best)
            values = tl.load(v_ptr + at[:, None] + dims[None, :], mask=is_token[:, None] & is_dim[None, :], other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            total = total * shrink + tl.sum(weights, 1)
            best = new_best
        out_at = places[:, None].to(tl.int64) * out_token + heads[:, None] * DIM + dims[None, :]
        result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at, result, mask=is_line[:, None] & is_dim[None, :])


def read_segments(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    page_tokens: int,
    scale: float,
) -> torch.Tensor:
    """Attention of all tokens of n segments, each over its own text up to itself.

    Args:
        query: `[T, H, D]`; tokens after the last segment's are padding.
        keys, values: `[cells, KV, D]`, contiguous.
        table: `[rows, pages]`, int32.
        rows, lengths: `[n]`, int64; a segment's last token sees `length` keys.
        starts: `[n + 1]`, int64, the place of each segment's first token, and their end.

    Returns:
        `[T, H, D]`, zeros for padding.
    """
    total, heads, dim = query.shape
    count, kv_heads = rows.shape[0], keys.shape[1]
    group = heads // kv_heads
    queries = max(1, _QUERIES // triton.next_power_of_2(group))
    out = torch.zeros(total, heads, dim, dtype=query.dtype, device=query.device)
    _read_tile[total // queries + count, kv_heads](
        query, keys, values, table, rows, starts, lengths, out, scale,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), table.stride(0), out.stride(0), count,
        GROUP=group, QUERIES=queries, LINES=max(_LEAST_HEADS, triton.next_power_of_2(queries * group)), DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim), TILE=TILE, PAGE=page_tokens, num_warps=4, **pdl.options(query.device),
    )  # fmt: skip
    return out
