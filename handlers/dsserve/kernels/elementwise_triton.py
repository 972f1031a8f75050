"""The Triton kernels of `gpu_ops` but for matmuls, one program a row, head or token. Importing this needs Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsserve.kernels import pdl
from dsserve.kernels.pdl import wait_for_inputs

_WIDTH = 1024  # elements of the gated product that a program computes
_FEW_TOKENS = 32


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, x_row, eps, SIZE: tl.constexpr, PAD: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    inside = at < SIZE
    wait_for_inputs(EARLY)
    x = tl.load(x_ptr + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    scaled = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(out_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * SIZE + at, weight * scaled, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `gpu_ops.rms_norm`."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    pad = triton.next_power_of_2(size)
    _rms_norm[(rows.shape[0],)](
        rows, weight, out, rows.stride(0), eps, SIZE=size, PAD=pad, num_warps=warps(pad),
        **pdl.options(x.device),
    )  # fmt: skip
    return out.view(x.shape)


@triton.jit
def _rotate(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, turn_batch, tokens, q_heads, k_heads,
    DIM: tl.constexpr, PAD: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token, some of its heads."""
    place, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_inputs(EARLY)
    batch, token = place // tokens, place % tokens
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        head, heads = group * HEADS + tl.arange(0, HEADS), q_heads
        source = q_ptr + batch * q_batch + head[:, None] * q_head + token * q_token
        target = q_out_ptr + (place * q_heads + head[:, None]) * DIM
    else:
        head, heads = (group - q_groups) * HEADS + tl.arange(0, HEADS), k_heads
        source = k_ptr + batch * k_batch + head[:, None] * k_head + token * k_token
        target = k_out_ptr + (place * k_heads + head[:, None]) * DIM
    half = tl.arange(0, PAD)
    is_half = half < DIM // 2
    turn = batch * turn_batch + token * DIM + half
    low_cos = tl.load(cos_ptr + turn, mask=is_half, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin_ptr + turn, mask=is_half, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos_ptr + turn + DIM // 2, mask=is_half, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin_ptr + turn + DIM // 2, mask=is_half, other=0.0).to(tl.float32)[None, :]
    inside, half = (head < heads)[:, None] & is_half[None, :], half[None, :]
    low = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + DIM // 2 + half, mask=inside, other=0.0).to(tl.float32)
    # Each product is rounded to the tensors' dtype before the sum, as in torch.
    kind = q_out_ptr.dtype.element_ty
    new_low = (low * low_cos).to(kind).to(tl.float32) - (high * low_sin).to(kind).to(tl.float32)
    new_high = (high * high_cos).to(kind).to(tl.float32) + (low * high_sin).to(kind).to(tl.float32)
    tl.store(target + half, new_low.to(kind), mask=inside)
    tl.store(target + DIM // 2 + half, new_high.to(kind), mask=inside)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gpu_ops.rotary`; the results have whole tokens in memory."""
    batch, heads, tokens, dim = q.shape
    new_q, new_k = (torch.empty(batch, tokens, x.shape[1], dim, dtype=q.dtype, device=q.device) for x in (q, k))
    turn_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    # Few tokens want all heads at once, many want few programs.
    size = 1 if batch * tokens <= _FEW_TOKENS else 8
    _rotate[batch * tokens, triton.cdiv(heads, size) + triton.cdiv(k.shape[1], size)](
        q, k, cos, sin, new_q, new_k, *q.stride()[:3], *k.stride()[:3], turn_batch, tokens, heads, k.shape[1],
        DIM=dim, PAD=triton.next_power_of_2(dim // 2), HEADS=size, num_warps=1, **pdl.options(q.device),
    )  # fmt: skip
    return new_q.transpose(1, 2), new_k.transpose(1, 2)


@triton.jit
def _gated_silu(gate_ptr, up_ptr, out_ptr, gate_row, up_row, size, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    wait_for_inputs(EARLY)
    gate = tl.load(gate_ptr + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + row * size + at, silu * up, mask=inside)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `gpu_ops.gated_silu`."""
    size = gate.shape[-1]
    if not size:  # a rank without a shard of a narrow layer
        return torch.empty_like(up)
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)
    out = torch.empty(gates.shape, dtype=up.dtype, device=up.device)
    grid = (gates.shape[0], triton.cdiv(size, _WIDTH))
    launch = pdl.options(gate.device)
    _gated_silu[grid](gates, ups, out, gates.stride(0), ups.stride(0), size, WIDTH=_WIDTH, **launch)
    return out.view(*gate.shape)


@triton.jit
def _store(
    keys_ptr, values_ptr, k_ptr, v_ptr, cells_ptr, k_batch, k_head, k_token, v_batch, v_head, v_token, tokens,
    SIZE: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    place, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    wait_for_inputs(EARLY)
    batch, token, head, dim = place // tokens, place % tokens, at // DIM, at % DIM
    if tl.program_id(1) == 0:
        source = k_ptr + batch * k_batch + token * k_token + head * k_head + dim
        target = keys_ptr
    else:
        source = v_ptr + batch * v_batch + token * v_token + head * v_head + dim
        target = values_ptr
    cell = tl.load(cells_ptr + place)
    inside = (at < SIZE) & (cell >= 0)
    tl.store(target + cell * SIZE + at, tl.load(source, mask=inside, other=0.0), mask=inside)


def store(
    keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, cells: torch.Tensor
) -> None:
    """See `gpu_ops.store`."""
    _, heads, tokens, dim = new_keys.shape
    size = heads * dim
    pad = triton.next_power_of_2(size)
    _store[cells.shape[0], 2](
        keys, values, new_keys, new_values, cells, *new_keys.stride()[:3], *new_values.stride()[:3], tokens,
        SIZE=size, DIM=dim, PAD=pad, num_warps=warps(pad), **pdl.options(keys.device),
    )  # fmt: skip


def warps(elements: int) -> int:
    """About 16 elements a thread."""
    return max(1, min(16, elements // 512))
