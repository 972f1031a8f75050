"""Programmatic dependent launch (Hopper GPUs): a kernel's programs begin while the kernel before it still runs.

Between two kernels of a decode step lie about a microsecond of launch and the time until the memory is busy again, some
hundred times a step. A kernel that is launched early has its programs in place by then, and its weights on the way into
the L2 cache. Every program must call `wait_for_inputs` before it touches what another kernel writes or reads; weights
never change, and may be fetched before. Importing this needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

_LINE = tl.constexpr(128)  # bytes that the L2 cache fetches at once


@cache
def options(device: torch.device) -> dict[str, Any]:
    """How a kernel with a parameter EARLY is launched on a device."""
    is_hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    if not is_hopper or not hasattr(getattr(tl.extra, "cuda", None), "gdc_wait"):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Returns when the kernels before have ended and their writes can be seen; those behind may begin from now on."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_rows(weight_ptr, rows, weight_row, size, LINES: tl.constexpr):
    """Fetches the first LINES cache lines of rows of a weight into the L2 cache and waits for nothing.

    Args:
        rows: `[ROWS]`, which; all of them in the weight.
        weight_row: elements from one row to the next.
        size: elements of a row.
    """
    columns = tl.arange(0, LINES) * (8 * _LINE // weight_ptr.dtype.element_ty.primitive_bitwidth)
    columns = tl.where(columns < size, columns, 0)
    lines = (weight_ptr + rows[:, None].to(tl.int64) * weight_row + columns[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )
