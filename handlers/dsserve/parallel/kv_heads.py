"""Attention heads and ranks: each rank gets whole heads and at least one, or the number of ranks is refused.

DeepSpeed gives each rank whole KV heads with the queries that read them; ranks beyond the number of KV heads would get
nothing. There KV heads are repeated before the split, so that copies of one head serve its queries on several ranks.
Covers layers with a `k_proj` and a `v_proj`; does not split anything itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dsserve.core.errors import LoadError

_KV_PROJECTIONS = ("k_proj", "v_proj")


def head_size(text_config: Any) -> int:
    """Values of one attention head, of a transformers config."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def plan_kv_copies(model: Any, num_ranks: int) -> int:
    """How often each KV head must be repeated so that every rank holds one; 1 where there are enough.

    The fewest copies: more of them would even out the heads of some ranks, and take KV memory on all.

    Args:
        model: as transformers makes it; the meta device will do.

    Raises:
        LoadError: a rank would have no attention head; the message has the numbers that work.
    """
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    meta = AutoTPMeta.from_model_config(model.config)  # DeepSpeed's own reading decides where it cuts
    heads, kv_heads = meta.num_attention_heads, meta.num_kv_heads
    if heads is None or kv_heads is None or num_ranks <= kv_heads:
        return 1
    if num_ranks > heads:
        raise _no_head(model, num_ranks, f"{heads} attention head(s)", heads)
    if not any(_kv_attentions(model)):
        what = f"{kv_heads} KV head(s), and only those with a k_proj and a v_proj of their own can be repeated"
        raise _no_head(model, num_ranks, what, kv_heads)
    group = heads // kv_heads
    return next(copies for copies in range(2, group + 1) if group % copies == 0 and kv_heads * copies >= num_ranks)


def _no_head(model: Any, num_ranks: int, has: str, most: int) -> LoadError:
    return LoadError(
        f"{type(model).__name__} on {num_ranks} ranks: it has {has}, so that a rank would be without; set "
        f"torchrun.nproc-per-node to {most} or less"
    )


def repeat_kv_heads(model: Any, num_ranks: int) -> int:
    """Repeats KV heads, in place, until every rank gets one, and returns the copies of each; the logits stay.

    Raises:
        LoadError: see `plan_kv_copies`.
    """
    copies = plan_kv_copies(model, num_ranks)
    if copies > 1:
        copy_kv_heads(model, copies)
    return copies


def copy_kv_heads(model: Any, copies: int) -> None:
    """Puts `copies` of each KV head in its place, in the weights and in the config.

    Query head i reads KV head i // (heads / KV heads), so copies lie side by side.
    """
    config = model.config.get_text_config()
    kv_heads = config.num_key_value_heads
    for attention in _kv_attentions(model):
        for name in _KV_PROJECTIONS:
            projection = getattr(attention, name)
            projection.weight = _repeat(projection.weight, kv_heads, copies)
            projection.bias = None if projection.bias is None else _repeat(projection.bias, kv_heads, copies)
            projection.out_features = projection.weight.shape[0]
        attention.num_key_value_groups //= copies
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = kv_heads * copies
    config.num_key_value_heads = kv_heads * copies


def _repeat(tensor: torch.Tensor, kv_heads: int, copies: int) -> nn.Parameter:
    """`[kv_heads * head_dim, ...]` -> `[kv_heads * copies * head_dim, ...]`."""
    heads = tensor.detach().unflatten(0, (kv_heads, -1))
    return nn.Parameter(heads.repeat_interleave(copies, dim=0).flatten(0, 1), requires_grad=False)


def _kv_attentions(model: nn.Module) -> Iterator[Any]:
    """The attention layers whose KV heads can be repeated."""
    for module in model.modules():
        if hasattr(module, "num_key_value_groups") and all(
            isinstance(getattr(module, name, None), nn.Linear) for name in _KV_PROJECTIONS
        ):
            yield module
