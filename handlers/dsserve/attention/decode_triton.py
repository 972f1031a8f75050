"""The Triton kernels of `decode`. Imported on first use only, where Triton is installed."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsserve.kernels import pdl
from dsserve.kernels.pdl import wait_for_inputs

_LEAST_HEADS = 16  # rows of the smallest matrix product


@triton.jit
def _read_part(
    q_ptr, k_ptr, v_ptr, mask_ptr, sums_ptr, best_ptr, total_ptr, scale,
    q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token, mask_row,
    length, chunk, parts,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One row, one KV head, one part of its tokens: unnormalized sums, the best score and the total of weights."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, dims = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD)
    is_head, is_dim = heads < GROUP, dims < DIM
    wait_for_inputs(EARLY)
    q_at = row * q_row + (head * GROUP + heads)[:, None] * q_head + dims[None, :]
    query = tl.load(q_ptr + q_at, mask=is_head[:, None] & is_dim[None, :], other=0.0)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    sums = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for start in range(0, chunk, TILE):
        tokens = part * chunk + start + tl.arange(0, TILE)
        is_token = tokens < length
        bias = tl.load(mask_ptr + row * mask_row + tokens, mask=is_token, other=float("-inf")).to(tl.float32)
        if tl.max(bias, 0) > float("-inf"):
            at = tokens.to(tl.int64)
            k_at = row.to(tl.int64) * k_row + head * k_head + at[None, :] * k_token + dims[:, None]
            keys = tl.load(k_ptr + k_at, mask=is_dim[:, None] & is_token[None, :], other=0.0)
            scores = tl.dot(query, keys, input_precision="ieee") * scale + bias[None, :]
            new_best = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - new_best[:, None])
            shrink = tl.exp(best - new_best)
            v_at = row.to(tl.int64) * v_row + head * v_head + at[:, None] * v_token + dims[None, :]
            values = tl.load(v_ptr + v_at, mask=is_token[:, None] & is_dim[None, :], other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            total = total * shrink + tl.sum(weights, 1)
            best = new_best
    slot = ((row * tl.num_programs(1) + head) * GROUP + heads) * parts + part
    tl.store(best_ptr + slot, best, mask=is_head)
    tl.store(total_ptr + slot, total, mask=is_head)
    tl.store(sums_ptr + slot[:, None] * DIM + dims[None, :], sums, mask=is_head[:, None] & is_dim[None, :])


@triton.jit
def _join_parts(
    sums_ptr, best_ptr, total_ptr, out_ptr, parts, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PARTS_PAD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one row: its parts, weighted by how far their best scores lie below the best of all."""
    head = tl.program_id(0)
    each, dims = tl.arange(0, PARTS_PAD), tl.arange(0, DIM_PAD)
    is_part, is_dim = each < parts, dims < DIM
    wait_for_inputs(EARLY)
    best = tl.load(best_ptr + head * parts + each, mask=is_part, other=float("-inf"))
    weight = tl.exp(best - tl.max(best, 0))
    total = tl.load(total_ptr + head * parts + each, mask=is_part, other=0.0)
    at = (head * parts + each)[:, None] * DIM + dims[None, :]
    sums = tl.load(sums_ptr + at, mask=is_part[:, None] & is_dim[None, :], other=0.0)
    result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + head * DIM + dims, result.to(out_ptr.dtype.element_ty), mask=is_dim)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    tile: int,
    blocks: int,
) -> torch.Tensor:
    """See `decode`; tokens of a row are split so that about `blocks` blocks run."""
    rows, heads, _, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    tiles = triton.cdiv(length, tile)
    chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(blocks, rows * kv_heads))) * tile
    parts = triton.cdiv(length, chunk)
    sums = torch.empty(rows, heads, parts, dim, dtype=torch.float32, device=query.device)
    best = torch.empty(2, rows, heads, parts, dtype=torch.float32, device=query.device)
    out = torch.empty(rows, heads, 1, dim, dtype=query.dtype, device=query.device)
    dim_pad, launch_early = triton.next_power_of_2(dim), pdl.options(query.device)
    _read_part[rows, kv_heads, parts](
        query, key, value, mask, sums, best[0], best[1], scale,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2), mask.stride(0),
        length, chunk, parts,
        GROUP=group, GROUP_PAD=max(_LEAST_HEADS, triton.next_power_of_2(group)), DIM=dim, DIM_PAD=dim_pad, TILE=tile,
        **launch_early,
    )  # fmt: skip
    _join_parts[(rows * heads,)](
        sums, best[0], best[1], out, parts, DIM=dim, DIM_PAD=dim_pad, PARTS_PAD=triton.next_power_of_2(parts),
        **launch_early,
    )  # fmt: skip
    return out
