"""GPU only: a decode step's matmuls and the small operations between them as Triton kernels.

Shapes and rounding are those of the torch code that they replace (`fused_ops`); Triton comes with torch's CUDA builds.
Nothing is compiled ahead: a kernel takes about a second the first time, and Triton keeps it on disk.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

_kernels: Any = None
_matmul: Any = None


def load_gpu_ops() -> bool:
    """Imports the kernels; False, with the reason in the log, where there is no Triton."""
    global _kernels, _matmul
    try:
        from dsserve.kernels import elementwise_triton, matmul_triton
    except ImportError as error:
        logger.warning("[dsserve] no fused GPU operations: %s", error)
        return False
    _kernels, _matmul = elementwise_triton, matmul_triton
    return True


def is_loaded() -> bool:
    """Whether the operations can be called in this process."""
    return _kernels is not None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`[..., H]` -> `[..., H]`: fp32 inside, rounded before the weight is applied."""
    return _kernels.rms_norm(x, weight, eps)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, H, T, D]` and `[B, KV, T, D]` turned by `[B or 1, T, D]`; every product is rounded, as torch's are."""
    return _kernels.rotary(q, k, cos, sin)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, `[..., I]`; both may be parts of one wider tensor."""
    return _kernels.gated_silu(gate, up)


def store(
    keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, cells: torch.Tensor
) -> None:
    """Writes tokens `[B, KV, T, D]`, in the order of B and T, to cells of `[rows, max_len, KV, D]`.

    Args:
        cells: `[n]`, row * max_len + position; tokens after the n-th, and those of negative cells, are padding.
    """
    _kernels.store(keys, values, new_keys, new_values, cells)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, `[..., in]` -> `[..., out]`: a few rows by our kernels, more by cuBLAS.

    Args:
        weight: `[out, in]` in the dtype of `x`, or int8 or fp8 with a scale.
        out: `[n, out]`, memory for the result's rows; None = new memory.
        scale: `[out]`, fp32, of each row of the weight.
    """
    rows = x.reshape(-1, x.shape[-1])
    if out is None:
        out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if 0 < rows.shape[0] <= _matmul.most_rows(x, scale is not None):
        _matmul.multiply_few(rows, weight, bias, out, scale)
    else:
        whole = weight if scale is None else _matmul.expand(weight, scale, x.dtype)
        if bias is None:
            torch.mm(rows, whole.t(), out=out)
        else:
            torch.addmm(bias, rows, whole.t(), out=out)
    return out.view(*x.shape[:-1], weight.shape[0])


def multiply_gated(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor | None:
    """`silu(a) * b` of the halves a and b of `x @ weight.T`, `[..., in]` -> `[..., out / 2]`, in one kernel; None for
    more rows than that pays for. Arguments as of `multiply`."""
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < rows.shape[0] <= _matmul.most_rows(x):
        return None
    out = torch.empty(rows.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    _matmul.multiply_few(rows, weight, None, out, scale, is_gated=True)
    return out.view(*x.shape[:-1], -1)
