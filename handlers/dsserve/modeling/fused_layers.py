"""Decoder layers of Llama's form with each addition to the residual fused with the sum before and the norm behind it.

A layer is replaced only where its forward pass is Llama's instruction for instruction (Mistral, Qwen2, Qwen3, ...), its
norms are fused ones (`fused_ops`) and its row-parallel matmuls ours (`linear`). On GPUs alone; `rank_sum` sums.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dsserve.modeling.fused_ops import FusedRMSNorm
from dsserve.modeling.linear import ShardedLinear
from dsserve.parallel.rank_sum import RankSum


class FusedLayer(nn.Module):
    """A layer's parts in the order of LlamaDecoderLayer.forward.

    Args:
        next_norm: what the model does to this layer's result next.
        sums: after attention and after the MLP, never the same.
    """

    def __init__(self, layer: Any, next_norm: FusedRMSNorm, sums: tuple[RankSum, RankSum]) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self._next_norm = (next_norm,)  # it is another module's child
        self._sums = sums
        for linear, rank_sum in zip((layer.self_attn.o_proj, layer.mlp.down_proj), sums, strict=True):
            linear.leave_sum_to(rank_sum)

    @property
    def sums_in_memory(self) -> int:
        """How many of the layer's sums go through the ranks' memory, where `count_all_reduces` does not see them."""
        return sum(rank_sum.in_memory for rank_sum in self._sums)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`[B, T, H]` -> `[B, T, H]`; the next norm has its result already."""
        (after_attention, after_mlp), (next_norm,) = self._sums, self._next_norm
        norm = self.post_attention_layernorm
        part, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden, normed = after_attention.add_norm(part, hidden_states, norm.weight, norm.eps)
        hidden, normed = after_mlp.add_norm(self.mlp(normed), hidden, next_norm.weight, next_norm.eps)
        next_norm.expect(hidden, normed)
        return hidden


def can_fuse_layers(module: Any, world_size: int) -> bool:
    """Whether all layers of a causal language model that is sharded over so many ranks can be replaced, after packing
    and fused operations."""
    decoder = getattr(module, "model", None)
    layers, last_norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(last_norm, FusedRMSNorm):
        return False
    return all(_can_fuse(layer, world_size) for layer in layers)


def use_fused_layers(module: Any, sums: tuple[RankSum, RankSum]) -> int:
    """Replaces the layers in place where `can_fuse_layers`; returns how many."""
    layers = module.model.layers
    norms = [*[layer.input_layernorm for layer in layers][1:], module.model.norm]
    for index, next_norm in enumerate(norms):
        layers[index] = FusedLayer(layers[index], next_norm, sums)
    return len(layers)


def _can_fuse(layer: Any, world_size: int) -> bool:
    if _code(layer) != _code(LlamaDecoderLayer):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    linears = (getattr(layer.self_attn, "o_proj", None), getattr(layer.mlp, "down_proj", None))
    return all(isinstance(norm, FusedRMSNorm) for norm in norms) and all(
        isinstance(linear, ShardedLinear) and linear.can_leave_sum(world_size) for linear in linears
    )


def _code(layer: Any) -> tuple[bytes, tuple[str, ...], tuple[Any, ...]]:
    """What a layer's forward pass does, whatever its class is called."""
    code: CodeType = inspect.unwrap(layer.forward).__code__
    return code.co_code, code.co_names, code.co_consts
