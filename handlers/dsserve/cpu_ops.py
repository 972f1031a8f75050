"""CPU only: the small operations between a decode step's matmuls as three compiled ones (csrc/cpu_ops.cpp).

Compiled once by torch's extension builder (about 10 s; needs g++ and ninja). An operation is replaced only where the
compiled one gives the same numbers on random input, so other kinds of norm and rotary embedding stay as they are.
Does not touch matmuls (`packing`) or attention.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "csrc" / "cpu_ops.cpp"
# Without contraction (fused multiply-add) products round as torch's do.
_FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off"]
_ROTARY = "apply_rotary_pos_emb"  # transformers' modelling files call it by this name, each its own
# Roundings that may fall differently because sums are taken in another order, in units of the dtype's last place.
_PLACES = 4


class FusedRMSNorm(nn.Module):
    """`weight * x / rms(x)` in one call, rounded as transformers' LlamaRMSNorm rounds."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> `[..., H]`."""
        return torch.ops.dsserve_cpu.rms_norm(x, self.weight, self.eps)


@cache
def load_cpu_ops() -> bool:
    """Compiles (the first time) and loads the operations; False, with the reason in the log, where that cannot be."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        logger.warning("[dsserve] no compiled CPU operations: %s not found on PATH", " and ".join(missing))
        return False
    from torch.utils.cpp_extension import load_inline

    try:
        # The text, not the file: its path differs at every start, and a new path is compiled anew.
        load_inline(
            "dsserve_cpu_ops", [_SOURCE.read_text(encoding="utf-8")], extra_cflags=_FLAGS, is_python_module=False,
            no_implicit_headers=True, with_pytorch_error_handling=False,
        )  # fmt: skip
    except (RuntimeError, OSError, ImportError) as error:
        logger.warning("[dsserve] no compiled CPU operations: %s", str(error).strip().splitlines()[0])
        return False
    return True


def is_loaded() -> bool:
    """Whether the operations can be called in this process."""
    return hasattr(torch.ops.dsserve_cpu, "store")


def use_cpu_ops(module: nn.Module) -> int:
    """Replaces the norms of `module` in place and the rotary function of its modelling files; returns how many.

    Rotary functions are replaced in transformers' modelling modules, since layers call them by name (transformers
    5.23); one process serves one model.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            fused = _fuse_norm(child) if type(child).__name__.endswith("RMSNorm") else None
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    dtype = next(module.parameters()).dtype
    for namespace in {sys.modules[type(part).__module__] for part in module.modules()}:
        original = getattr(namespace, _ROTARY, None)
        if original is not None and _is_same_rotary(original, dtype):
            setattr(namespace, _ROTARY, _rotary_or(original))
            count += 1
    return count


def _fuse_norm(norm: Any) -> FusedRMSNorm | None:
    """The same norm in one call, or None for a norm that computes something else."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or eps is None or weight.dim() != 1:
        return None
    fused = FusedRMSNorm(weight, eps)
    x = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        return fused if _is_close(fused(x), norm(x)) else None


def _is_same_rotary(function: Callable[..., Any], dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 64, generator=generator).to(dtype) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 64, generator=generator).to(dtype) for _ in range(2))
    try:
        expected = function(q, k, cos, sin)
    except Exception:  # a function of the same name with another signature: not ours to replace
        return False
    found = torch.ops.dsserve_cpu.rotary(q, k, cos, sin)
    return len(expected) == 2 and all(_is_close(a, b) for a, b in zip(found, expected, strict=True))


def _rotary_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if rest or more or cos.dim() != 3 or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return original(q, k, cos, sin, *rest, **more)
        return torch.ops.dsserve_cpu.rotary(q, k, cos.contiguous(), sin.contiguous())

    return rotary


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    places = _PLACES * torch.finfo(expected.dtype).eps
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=places, atol=places)
