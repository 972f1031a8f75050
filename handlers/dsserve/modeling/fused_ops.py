"""The small operations between a step's matmuls as a few fused ones: norm, rotary embedding, KV writes, gated MLP.

On a CPU they are compiled C++ (`cpu_ops`), on a GPU Triton kernels (`gpu_ops`). An operation is replaced only where the
fused one gives the same numbers on random input, so other kinds of norm and rotary embedding stay as they are. Does not
touch matmuls (`linear`) or attention (`attention.decode`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsserve.modeling.linear import FusedPart

_ROTARY = "apply_rotary_pos_emb"  # transformers' modelling files call it by this name, each its own
# Roundings that may fall differently because sums are taken in another order, in units of the dtype's last place.
_PLACES = 4


# Few and many: a GPU turns them in other blocks.
_ROTARY_TOKENS = (3, 24)
# One kernel computes the beginning of a gated MLP of few rows.
_NORM_ROWS, _MLP_ROWS = (4,), (1, 4, 40)
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class FusedRMSNorm(nn.Module):
    """`weight * x / rms(x)` in one call, rounded as transformers' LlamaRMSNorm rounds.

    Whoever has the result already (`fused_layers`) says so by `expect`.
    """

    def __init__(self, ops: Any, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._ops = ops
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps
        self._expected: tuple[torch.Tensor, torch.Tensor] | None = None

    def expect(self, x: torch.Tensor, normed: torch.Tensor) -> None:
        """Notes the result for an input, this very tensor, which comes next."""
        self._expected = (x, normed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> `[..., H]`."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] is x:
            return expected[1]
        return self._ops.rms_norm(x, self.weight, self.eps)


class FusedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` with the activation and the product in one call, of few rows on a GPU with the
    matmul before them."""

    def __init__(self, ops: Any, mlp: Any) -> None:
        super().__init__()
        self._ops = ops
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> `[..., H]`."""
        gated = self.gate_proj.multiply_gated(x) if isinstance(self.gate_proj, FusedPart) else None
        return self.down_proj(self._ops.gated_silu(self.gate_proj(x), self.up_proj(x)) if gated is None else gated)


class FusedRotary:
    """A modelling file's rotary function in one call. It serves every model of that file in the process, so what the
    operation does not compute, and tensors of another device (a reference on the CPU), go to the original."""

    def __init__(self, ops: Any, original: Callable[..., Any], device: torch.device) -> None:
        self._ops = ops
        self.original = original
        self._device = device

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        """`[B, H, T, D]` and `[B, KV, T, D]` turned by `[B, T, D]`."""
        is_ours = q.device == self._device and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype
        if rest or more or not is_ours:
            return self.original(q, k, cos, sin, *rest, **more)
        return self._ops.rotary(q, k, cos.contiguous(), sin.contiguous())


def use_fused_ops(module: nn.Module, ops: Any) -> int:
    """Replaces the norms and gated MLPs of `module` in place and the rotary function of its modelling files; returns
    how many.

    Rotary functions are replaced in transformers' modelling modules, since layers call them by name (transformers
    5.23); see `FusedRotary`.
    """
    count, parameter = 0, next(module.parameters())
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            fused = _fuse(child, ops, parameter)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    for namespace in {sys.modules[type(part).__module__] for part in module.modules()}:
        original = getattr(namespace, _ROTARY, None)
        if isinstance(original, FusedRotary):  # of a model before this one
            original = original.original
        if original is not None and _is_same_rotary(original, parameter, ops):
            setattr(namespace, _ROTARY, FusedRotary(ops, original, parameter.device))
            count += 1
    return count


def _fuse(child: Any, ops: Any, like: torch.Tensor) -> nn.Module | None:
    """The same layer in fewer calls, or None for a layer that computes something else."""
    kind, width = type(child).__name__, 0
    counts: tuple[int, ...] = _NORM_ROWS
    fused: nn.Module | None = None
    if kind.endswith("RMSNorm"):
        weight, eps = getattr(child, "weight", None), getattr(child, "variance_epsilon", None)
        if weight is not None and eps is not None and weight.dim() == 1:
            fused, width = FusedRMSNorm(ops, weight, eps), weight.shape[0]
    elif kind.endswith("MLP") and hasattr(ops, "gated_silu") and all(hasattr(child, name) for name in _GATED):
        fused, width, counts = FusedMLP(ops, child), _inputs(child.gate_proj), _MLP_ROWS
    if fused is None:
        return None
    return fused if all(_is_same_layer(fused, child, rows, width, like) for rows in counts) else None


@torch.inference_mode()
def _is_same_layer(fused: nn.Module, child: Any, rows: int, width: int, like: torch.Tensor) -> bool:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(like)
    found, expected = fused(x).float(), child(x).float()
    return bool((found - expected).norm() <= _PLACES * torch.finfo(like.dtype).eps * expected.norm())


def _inputs(linear: Any) -> int:
    """How many values a linear layer reads. An MLP's `hidden_size` does not say so: AutoTP divides it by the ranks."""
    return linear.in_features if hasattr(linear, "in_features") else linear.weight.shape[-1]


def _is_same_rotary(function: Callable[..., Any], like: torch.Tensor, ops: Any) -> bool:
    return all(_is_same_rotary_of(tokens, function, like, ops) for tokens in _ROTARY_TOKENS)


def _is_same_rotary_of(tokens: int, function: Callable[..., Any], like: torch.Tensor, ops: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, tokens, 64, generator=generator).to(like) for heads in (4, 2))
    cos, sin = (torch.randn(2, tokens, 64, generator=generator).to(like) for _ in range(2))
    try:
        expected = function(q, k, cos, sin)
    except Exception:  # a function of the same name with another signature: not ours to replace
        return False
    found = ops.rotary(q, k, cos, sin)
    return len(expected) == 2 and all(_is_close(a, b) for a, b in zip(found, expected, strict=True))


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    places = _PLACES * torch.finfo(expected.dtype).eps
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=places, atol=places)
