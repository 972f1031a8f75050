"""The matmuls of decode steps as Triton kernels: few rows, so that reading the weight is all that takes time.

cuBLAS reads it at 59 to 91 % of the memory's bandwidth at one row. Weights of 8 bits are read as they are, and each
output is multiplied by the scale of its row. A gate and its counterpart may be joined at once, as gated MLPs do.
Importing this needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from dsserve.kernels import pdl
from dsserve.kernels.pdl import prefetch_rows, wait_for_inputs

# What a program of a one-row matmul computes and reads at a time, and the cache lines of each weight row that it
# fetches before its input is there: the best of 13 on an H200 for the matrices of a 6.7 billion Llama, 71 to 97 % of
# the read bandwidth, and again of 17 on H100s, launched early.
_OUTPUTS, _COLUMNS, _WARPS, _LINES = 2, 1024, 4, 8
# The same for several rows, on tensor cores: the best of 21 on H100s for 8 and 16 rows. At 64 rows cuBLAS is faster.
_MOST_ROWS = 32
_ROWS_OUTPUTS, _ROWS_COLUMNS, _ROWS_WARPS, _ROWS_STAGES, _ROWS_LINES = 64, 256, 4, 3, 4
# The same for weights of 8 bits, the best of 36 and of 36 on an H100. More rows take the weight expanded, and cuBLAS.
_SCALED_OUTPUTS, _SCALED_ROWS_OUTPUTS, _SCALED_ROWS_STAGES = 1, 32, 4
# So many rows take 176 KiB of shared memory, which GPUs of these compute capabilities have.
_MOST_SCALED_ROWS, _LARGE_SHARED = 64, (9, 10)
_EXPANDED = 4096  # values of a row that a program expands


@triton.jit
def _begin(weight_ptr, places, outputs, size, weight_row, LINES: tl.constexpr, EARLY: tl.constexpr):
    """Pointers `[OUTPUTS, 1]` to the weight's rows at `places`, those from `outputs` on not to be read; the beginnings
    of the rows are fetched while the input is waited for, which is there then."""
    source = weight_ptr + places[:, None].to(tl.int64) * weight_row
    if EARLY and LINES > 0:
        prefetch_rows(weight_ptr, tl.minimum(places, outputs - 1), weight_row, size, LINES)
    wait_for_inputs(EARLY)
    return source


@triton.jit
def _places(outputs, OUTPUTS: tl.constexpr, IS_GATED: tl.constexpr):
    """Which rows of the weight this program multiplies, `[OUTPUTS]`, and whether there are such; of a gated MLP each
    row of the gate's half and then its counterpart of the other half."""
    at = tl.arange(0, OUTPUTS)
    if IS_GATED:
        half = outputs // 2
        place = tl.program_id(0) * (OUTPUTS // 2) + at // 2
        return place + at % 2 * half, place < half
    place = tl.program_id(0) * OUTPUTS + at
    return place, place < outputs


@triton.jit
def _gate(gate, up, kind: tl.constexpr):
    """`silu(gate) * up`, rounded where torch would."""
    gate, up = gate.to(kind).to(tl.float32), up.to(kind)
    return (gate / (1.0 + tl.exp(-gate))).to(kind) * up


@triton.jit
def _multiply_row(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, outputs, size, weight_row,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, IS_SCALED: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, WIDTH)
    rows, is_row = _places(outputs, OUTPUTS, IS_GATED)
    source = _begin(weight_ptr, rows, outputs, size, weight_row, LINES, EARLY)
    sums = tl.zeros([OUTPUTS, WIDTH], tl.float32)
    for start in range(0, size, WIDTH):
        columns = start + at
        inside = columns < size
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(source + columns[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        sums += weight.to(tl.float32) * x[None, :]
    result = tl.sum(sums, 1)
    if IS_SCALED:
        result *= tl.load(scale_ptr + rows, mask=is_row, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    if IS_GATED:
        gate, up = tl.split(tl.reshape(result, [OUTPUTS // 2, 2]))
        place = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        tl.store(out_ptr + place, _gate(gate, up, out_ptr.dtype.element_ty), mask=place < outputs // 2)
    else:
        tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def _multiply_rows(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, outputs, size, x_row, weight_row, out_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, IS_SCALED: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    places, is_place = _places(outputs, OUTPUTS, IS_GATED)
    is_row = row < rows
    source = _begin(weight_ptr, places, outputs, size, weight_row, LINES, EARLY)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, size, WIDTH):
        columns = start + at
        inside = columns < size
        weight = tl.load(source + columns[None, :], mask=is_place[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + row[None, :] * x_row + columns[:, None], mask=is_row[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(weight.to(x.dtype), x, sums)  # 8 bits are exact in any dtype
    if IS_SCALED:
        sums *= tl.load(scale_ptr + places, mask=is_place, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + places, mask=is_place, other=0.0).to(tl.float32)[:, None]
    kind = out_ptr.dtype.element_ty
    if IS_GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, [OUTPUTS // 2, 2, ROWS]), (0, 2, 1)))
        place = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        target = out_ptr + row[None, :].to(tl.int64) * out_row + place[:, None]
        tl.store(target, _gate(gate, up, kind), mask=(place < outputs // 2)[:, None] & is_row[None, :])
    else:
        target = out_ptr + row[None, :].to(tl.int64) * out_row + places[:, None]
        tl.store(target, sums.to(kind), mask=is_place[:, None] & is_row[None, :])


@triton.jit
def _expand(weight_ptr, scale_ptr, out_ptr, size, weight_row, WIDTH: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    values = tl.load(weight_ptr + row * weight_row + at, mask=at < size, other=0.0).to(tl.float32)
    result = values * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * size + at, result.to(out_ptr.dtype.element_ty), mask=at < size)


def most_rows(x: torch.Tensor, is_scaled: bool = False) -> int:
    """The rows of inputs like `x` up to which `multiply_few` is faster than cuBLAS."""
    if x.dtype == torch.float32:
        return 1
    return _most_scaled_rows(x.device) if is_scaled else _MOST_ROWS


@cache
def _most_scaled_rows(device: torch.device) -> int:
    major, _ = torch.cuda.get_device_capability(device)
    return _MOST_SCALED_ROWS if major in _LARGE_SHARED else _MOST_ROWS


def multiply_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    is_gated: bool = False,
) -> None:
    """Writes `x @ weight.T + bias` of 1 to `most_rows` rows, `[n, in]`, to `out`, `[n, out]`; rows of whole elements.

    Args:
        weight: `[out, in]`; int8 or fp8 with a scale.
        scale: `[out]`, fp32, of each row of the weight; None = it is in the dtype of `x`.
        is_gated: write `silu(a) * b`, `[n, out / 2]`, of the product's halves.
    """
    outputs, size = weight.shape
    count, is_scaled = x.shape[0], scale is not None
    tensors = (x, weight, weight if scale is None else scale, weight if bias is None else bias, out)
    forms = {"IS_SCALED": is_scaled, "HAS_BIAS": bias is not None, "IS_GATED": is_gated}
    launch = pdl.options(x.device)
    if count == 1:
        places = _SCALED_OUTPUTS if is_scaled and not is_gated else _OUTPUTS
        _multiply_row[(triton.cdiv(outputs, places),)](
            *tensors, outputs, size, weight.stride(0),
            OUTPUTS=places, WIDTH=_COLUMNS, LINES=_LINES, num_warps=_WARPS, **forms, **launch,
        )  # fmt: skip
        return
    places = _SCALED_ROWS_OUTPUTS if is_scaled and count <= _MOST_ROWS else _ROWS_OUTPUTS
    _multiply_rows[(triton.cdiv(outputs, places),)](
        *tensors, count, outputs, size, x.stride(0), weight.stride(0), out.stride(0),
        ROWS=max(16, triton.next_power_of_2(count)), OUTPUTS=places, WIDTH=_ROWS_COLUMNS, LINES=_ROWS_LINES,
        num_warps=_ROWS_WARPS, num_stages=_SCALED_ROWS_STAGES if is_scaled else _ROWS_STAGES, **forms, **launch,
    )  # fmt: skip


def expand(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight * scale`, `[out, in]`, of 8 bits with a scale `[out]` for each row."""
    outputs, size = weight.shape
    out = torch.empty(outputs, size, dtype=dtype, device=weight.device)
    _expand[outputs, triton.cdiv(size, _EXPANDED)](weight, scale, out, size, weight.stride(0), WIDTH=_EXPANDED)
    return out
