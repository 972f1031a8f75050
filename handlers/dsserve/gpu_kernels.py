"""The Triton kernels of `gpu_ops`, one program a row, head or token. Importing this needs Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WIDTH = 1024  # elements of the gated product that a program computes


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, x_row, eps, SIZE: tl.constexpr, PAD: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    inside = at < SIZE
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
    _rms_norm[(rows.shape[0],)](rows, weight, out, rows.stride(0), eps, SIZE=size, PAD=pad, num_warps=_warps(pad))
    return out.view(x.shape)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_head, x_token, turn_batch, tokens, heads,
    DIM: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, token = place // tokens, place % tokens
    half = tl.arange(0, PAD)
    inside = half < DIM // 2
    x_at = x_ptr + batch * x_batch + head * x_head + token * x_token + half
    low = tl.load(x_at, mask=inside, other=0.0)
    high = tl.load(x_at + DIM // 2, mask=inside, other=0.0)
    turn = batch * turn_batch + token * DIM + half
    kind = out_ptr.dtype.element_ty
    low_cos = tl.load(cos_ptr + turn, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + turn, mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + turn + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + turn + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    low, high = low.to(tl.float32), high.to(tl.float32)
    # Each product is rounded to the tensors' dtype before the sum, as in torch.
    new_low = (low * low_cos).to(kind).to(tl.float32) - (high * low_sin).to(kind).to(tl.float32)
    new_high = (high * high_cos).to(kind).to(tl.float32) + (low * high_sin).to(kind).to(tl.float32)
    out_at = out_ptr + (place * heads + head) * DIM + half
    tl.store(out_at, new_low.to(kind), mask=inside)
    tl.store(out_at + DIM // 2, new_high.to(kind), mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One of `gpu_ops.rotary`'s two: `[B, H, T, D]`, the result with whole tokens in memory."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=x.dtype, device=x.device)
    turn_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    _rotate[batch * tokens, heads](
        x, cos, sin, out, x.stride(0), x.stride(1), x.stride(2), turn_batch, tokens, heads,
        DIM=dim, PAD=triton.next_power_of_2(dim // 2), num_warps=1,
    )  # fmt: skip
    return out.transpose(1, 2)


@triton.jit
def _gated_silu(gate_ptr, up_ptr, out_ptr, gate_row, up_row, size, WIDTH: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    gate = tl.load(gate_ptr + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + row * size + at, silu * up, mask=inside)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `gpu_ops.gated_silu`."""
    size = gate.shape[-1]
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)
    out = torch.empty(gates.shape, dtype=up.dtype, device=up.device)
    grid = (gates.shape[0], triton.cdiv(size, _WIDTH))
    _gated_silu[grid](gates, ups, out, gates.stride(0), ups.stride(0), size, WIDTH=_WIDTH)
    return out.view(*gate.shape)


@triton.jit
def _store(stored_ptr, new_ptr, cells_ptr, new_batch, new_head, new_token, tokens, SIZE: tl.constexpr,
           DIM: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    place, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    inside = at < SIZE
    batch, token = place // tokens, place % tokens
    new_at = batch * new_batch + token * new_token + (at // DIM) * new_head + at % DIM
    cell = tl.load(cells_ptr + place)
    tl.store(stored_ptr + cell * SIZE + at, tl.load(new_ptr + new_at, mask=inside, other=0.0), mask=inside)


def store(stored: torch.Tensor, new: torch.Tensor, cells: torch.Tensor) -> None:
    """One of `gpu_ops.store`'s two."""
    _, heads, tokens, dim = new.shape
    size = heads * dim
    pad = triton.next_power_of_2(size)
    _store[(cells.shape[0],)](
        stored, new, cells, new.stride(0), new.stride(1), new.stride(2), tokens,
        SIZE=size, DIM=dim, PAD=pad, num_warps=_warps(pad),
    )  # fmt: skip


def _warps(elements: int) -> int:
    """About 16 elements a thread."""
    return max(1, min(16, elements // 512))
