"""DeepSpeed's `transformer_inference` op in torch, for machines without a GPU: what `deepspeed/ops/csrc` computes.

Written after pt_binding.cpp, softmax.cu, transform.cu and inference_context.h of DeepSpeed 0.19.8, with their one
workspace and its offsets, their token counter, masks read by stride, the window that hides too much, the
residual that is updated in place, and GELU in its tanh form. What the kernels do not check is an error here: reading or
writing beyond the workspace. DeepSpeed's own torch fallbacks are no substitute: they take GELU's exact form for all
activations, and OPT's, GPT-J's and Llama's are wrong or missing. fp32 only; it does not show what a GPU's arithmetic
does (tests/gpu does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_GELU, _RELU = 1, 2


class Kernels:
    """Stands in for the compiled module: `BaseOp.inference_module = Kernels()`."""

    def __init__(self) -> None:
        self.tokens = 1
        self.memory = torch.empty(0)
        self.rows = self.longest = self.scores_at = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        stem, _, dtype = name.rpartition("_")
        if dtype != "fp32" and stem != "allocate_workspace":
            raise AttributeError(name)
        return object.__getattribute__(self, stem)

    # inference_context.h

    def allocate_workspace(
        self, hidden: int, heads: int, prompt: int, batch: int, layers: int, ranks: int = 1, external: bool = False,
        rank: int = 0, max_out_tokens: int = 1024, min_out_tokens: int = 1,
    ) -> None:  # fmt: skip
        head = hidden // heads
        padded = head if head > 128 else next(size for size in (32, 64, 128) if head <= size)
        activations = 10 * heads * padded * batch
        scores = batch * (heads // ranks) * max_out_tokens
        cache = layers * batch * (heads * padded // ranks) * 2
        self.rows, self.longest = batch, max_out_tokens
        # NaN: what is read before it was written shows.
        size = (activations + scores + (0 if external else cache)) * max_out_tokens
        self.memory = torch.full((size,), float("nan"))
        self.scores_at = size - scores * max_out_tokens

    def release_workspace(self) -> None:
        self.memory = torch.empty(0)

    def retake_workspace(self) -> bool:
        return True

    def reset_cache(self) -> None:
        self.tokens = 1

    def _at(self, offset: int, *shape: int) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        if offset + count > self.memory.numel():
            raise IndexError(f"illegal memory access: {offset} + {count} of {self.memory.numel()}")
        return self.memory[offset : offset + count].view(shape)

    # pt_binding.cpp

    def qkv_gemm(
        self, x: Any, weight: Any, _: Any, bias: Any, gamma: Any, beta: Any, eps: float, add_bias: bool, *__: Any
    ) -> list[Any]:
        norm = self._at(3 * x.numel(), *x.shape)
        norm.copy_(F.layer_norm(x, x.shape[-1:], gamma, beta, eps))
        out = self._at(0, *x.shape[:2], weight.shape[1])
        out.copy_(norm @ weight + (bias if add_bias else 0))
        return [out, norm]

    def rms_qkv_gemm(self, x: Any, weight: Any, _: Any, gamma: Any, eps: float, *__: Any) -> list[Any]:
        norm = self._at(3 * x.numel(), *x.shape)
        norm.copy_(F.rms_norm(x, x.shape[-1:], gamma, eps))
        out = self._at(0, *x.shape[:2], weight.shape[1])
        out.copy_(norm @ weight)
        return [out, norm]

    def linear_layer(self, x: Any, weight: Any, bias: Any, add_bias: bool, *_: Any) -> Any:
        out = self._at(0, *x.shape[:2], weight.shape[1])
        out.copy_(x @ weight + (bias if add_bias else 0))
        return out

    def vector_matmul(self, x: Any, weight: Any, *_: Any) -> Any:
        product = x @ weight
        out = self._at(0, *product.shape)
        out.copy_(product)
        return out

    def softmax_context(
        self, qkv: Any, mask: Any, rotary_dim: int, rotate_half: bool, rotate_every_two: bool, heads: int, num_kv: int,
        norm_factor: float, triangular: bool, local: bool, window: int, no_masking: bool, layer: int, layers: int,
        alibi: Any, rope_theta: float, is_prompt: bool, token_idx: Any, position_ids: Any,
    ) -> list[Any]:  # fmt: skip
        batch, new = qkv.shape[:2]
        head = qkv.shape[2] // (3 * heads)
        hidden = heads * head
        is_prompt = new > 1
        if is_prompt:
            self.tokens = new
        tokens = self.tokens
        capacity = hidden * self.rows * self.longest
        at = 10 * capacity + layer * 2 * capacity
        if batch > self.rows or tokens > self.longest:
            raise IndexError(f"illegal memory access: {batch} rows of {tokens} tokens")
        keys, values = (self._at(at + part, self.rows, heads, self.longest, head)[:batch] for part in (0, capacity))
        query = self._at(5 * batch * new * hidden, batch, heads, new, head)
        fresh = qkv.view(batch, new, 3, heads, head).permute(2, 0, 3, 1, 4).clone()
        first = 0 if is_prompt else tokens - 1
        if rotary_dim > 0:
            rotate(fresh[:2], rotary_dim, rotate_half, first, rope_theta)
        query.copy_(fresh[0])
        keys[:, :, first:tokens], values[:, :, first:tokens] = fresh[1], fresh[2]
        scores = self._at(self.scores_at, batch, heads, new, tokens)
        scores.copy_(norm_factor**2 * query @ keys[:, :, :tokens].transpose(2, 3))
        softmax(scores, mask, None, 1.0, triangular and is_prompt, local, window)
        context = scores @ values[:, :, :tokens]
        out = self._at(4 * batch * new * hidden, batch, new, hidden)
        out.copy_(context.transpose(1, 2).flatten(2))
        if layer == layers - 1:
            self.tokens += 1
        return [out, keys[:, :, :tokens], values[:, :, :tokens]]

    def softmax(
        self, scores: Any, mask: Any, alibi: Any, triangular: bool, recompute: bool, local: bool, window: int,
        async_op: bool, scale: float, head_offset: int, ranks: int,
    ) -> Any:  # fmt: skip
        """Unlike softmax.cu's float form this one adds alibi, as its forms for half precision do."""
        batch, heads = scores.shape[:2]
        if alibi is not None and alibi.dim() > 1:
            alibi = alibi.view(batch, heads * ranks, 1, -1)[:, head_offset : head_offset + heads]
        scores = scores.contiguous()
        softmax(scores, mask, alibi, scale, triangular, local, window)
        return scores

    def mlp_gemm(
        self, x: Any, residual: Any, x_bias: Any, weight: Any, weight_out: Any, bias: Any, gamma: Any, beta: Any,
        eps: float, pre_norm: bool, mlp_after_attn: bool, _: Any, __: Any, ___: Any, activation: Any, ____: Any,
    ) -> list[Any]:  # fmt: skip
        summed = x + residual + x_bias if mlp_after_attn else residual
        norm = self._at(2 * x.numel(), *x.shape)
        norm.copy_(F.layer_norm(summed, x.shape[-1:], gamma, beta, eps))
        inner = self._at(3 * x.numel(), *x.shape[:2], weight.shape[1])
        inner.copy_(activate(norm @ weight + bias, int(activation)))
        out = self._at(x.numel(), *x.shape)
        out.copy_(inner @ weight_out)
        return [out, norm]

    def rms_mlp_gemm(
        self, x: Any, residual: Any, weight: Any, weight_out: Any, gamma: Any, eps: float, *_: Any
    ) -> list[Any]:
        residual += x
        norm = self._at(2 * x.numel(), *x.shape)
        norm.copy_(F.rms_norm(residual, x.shape[-1:], gamma, eps))
        inner = self._at(3 * x.numel(), *x.shape[:2], weight.shape[1])
        inner.copy_(norm @ weight)
        up, gate = inner.chunk(2, dim=-1)
        out = self._at(x.numel(), *x.shape)
        out.copy_((up * F.silu(gate)) @ weight_out)
        return [out, residual]

    def fused_gemm_gelu(self, x: Any, weight: Any, _: Any, bias: Any, weight_out: Any, *__: Any) -> Any:
        return activate(x @ weight + bias, _GELU) @ weight_out

    def residual_add_bias(
        self, hidden: Any, residual: Any, attention: Any, attention_bias: Any, bias: Any, ranks: int,
        mlp_after_attn: bool, add_bias: bool, pre_norm: bool,
    ) -> Any:  # fmt: skip
        if not mlp_after_attn:
            total = hidden + attention + (residual + bias + (attention_bias if add_bias else 0)) / ranks
        elif pre_norm:
            total = (residual + attention + bias + attention_bias) / ranks + hidden
        else:
            total = residual + hidden + bias
        return residual.copy_(total)

    def _vector_add(self, a: Any, b: Any, gamma: float) -> Any:
        return a.mul_(gamma).add_(b)

    def layer_norm(self, x: Any, gamma: Any, beta: Any, eps: float) -> Any:
        return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)

    def gated_activation(self, *_: Any) -> Any:
        raise NotImplementedError

    rms_norm = pre_rms_norm = gated_activation


def rotate(heads: torch.Tensor, dim: int, half: bool, first: int, theta: float) -> None:
    """Queries and keys `[2, B, heads, S, head]`, in place."""
    positions = torch.arange(first, first + heads.shape[3]).float()
    angles = torch.outer(positions, 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim))
    cos, sin = angles.cos(), angles.sin()
    part = heads[..., :dim]
    one, other = part.chunk(2, dim=-1) if half else (part[..., ::2], part[..., 1::2])
    low, high = one.clone(), other.clone()
    one.copy_(low * cos - high * sin)
    other.copy_(high * cos + low * sin)


def softmax(
    scores: torch.Tensor, mask: Any, alibi: Any, scale: float, triangular: bool, local: bool, window: int
) -> None:
    """softmax.cu on `[B, heads, S, L]`, in place."""
    batch, heads, new, tokens = scores.shape
    total = scores * scale
    if alibi is not None:
        total = total + alibi
    if mask.dim() > 1:
        stride = mask.shape[2] if mask.dim() > 2 else 1
        lines = mask.reshape(-1, tokens) if mask.numel() % tokens == 0 else mask  # it reads on and on
        rows = torch.arange(batch * heads * new)
        chosen = rows // (heads * new) * stride + rows % stride
        total = total + lines[chosen].view(batch, heads, new, tokens)
    column, line = torch.arange(tokens)[None], torch.arange(new)[:, None]
    hidden = torch.zeros(new, tokens, dtype=torch.bool)
    if triangular:
        hidden |= column > line
    if local:
        position = line + (0 if new == tokens else tokens)
        hidden |= (position >= window) & (column <= position - window)
        # A thread's four tokens lie `width` apart, and the first of them decides for all.
        width = 32
        while width < min(256, -(-tokens // 4)):
            width *= 2
        first = column // (4 * width) * 4 * width + column % width
        hidden |= first // 4 < (position // 4 - window // 4).clamp(min=0)
    total = total.masked_fill(hidden, -10000.0)
    highest = total.amax(-1, keepdim=True).clamp(min=-10000.0)
    powers = (total - highest).exp()
    scores.copy_(powers / (powers.sum(-1, keepdim=True) + 1e-6))


def activate(x: torch.Tensor, kind: int) -> torch.Tensor:
    return F.relu(x) if kind == _RELU else F.gelu(x, approximate="tanh")


def install() -> None:
    """Makes DeepSpeed's operations call this module, on a CPU, in this process."""
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    import dsserve.injection.inject as inject

    BaseOp.inference_module = Kernels()
    inject.check_device = lambda device, dtype: None  # type: ignore[assignment]
