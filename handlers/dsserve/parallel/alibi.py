"""BLOOM's position bias (ALiBi) for the heads of one rank, and for prompts that are prefilled in one pass.

transformers 5 makes the bias for all heads, and DeepSpeed 0.19.8 cuts it only where a padding mask `[B, S]` is given.
Ours is cut always and understands the engine's masks `[n, 1, q, kv]`. Other models with ALiBi (MPT, Falcon's variant)
keep what DeepSpeed does for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def use_rank_alibi(module: nn.Module, rank: int, num_ranks: int) -> None:
    """Gives every BLOOM in `module` the bias of this rank's heads, as DeepSpeed has split them, in place."""
    from transformers.models.bloom.modeling_bloom import BloomModel

    for part in module.modules():
        if isinstance(part, BloomModel):
            first, last = _rank_heads(part.config, rank, num_ranks)
            part.build_alibi_tensor = RankAlibi(part.config.n_head, first, last, part.word_embeddings.weight.device)
            part.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _rank_heads(config: Any, rank: int, num_ranks: int) -> tuple[int, int]:
    """The rank's first head and the one after its last."""
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list

    sizes = get_shard_size_list(config.n_head, num_ranks, AutoTPMeta.from_model_config(config))
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


def _give_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Without a mask BLOOM makes the bias by itself, for all heads: an all-ones mask `[B, T]` says the same."""
    token_ids, cache = args[0] if args else kwargs["input_ids"], kwargs.get("past_key_values")
    if kwargs.get("attention_mask") is None:
        past = cache.get_seq_length() if cache is not None else 0
        kwargs["attention_mask"] = token_ids.new_ones(token_ids.shape[0], past + token_ids.shape[1])
    return args, kwargs


class RankAlibi:
    """What takes the place of `BloomModel.build_alibi_tensor`: the bias of heads `first` to `last`."""

    def __init__(self, heads: int, first: int, last: int, device: torch.device) -> None:
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        # The bias of a head is its slope times the key's position; at position 1 it is the slope.
        table = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # [heads, 1, 2]
        self._slopes = table[first:last, 0, 1].to(device)

    def __call__(self, attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """`[B, S]` or `[B, 1, q, S]` -> `[B * heads of this rank, 1, S]`."""
        positions = key_positions(attention_mask)
        return (self._slopes[:, None] * positions[:, None]).flatten(0, 1)[:, None].to(dtype)


def key_positions(mask: torch.Tensor) -> torch.Tensor:
    """Each key's position in its own text, `[B, S]`.

    Args:
        mask: `[B, S]`, 1 for tokens and 0 for padding; or additive, `[B, 1, q, S]`, 0 for what is seen. One query:
            column = position. Several: the last query that sees a key sees all of its text, in order.
    """
    if mask.dim() == 2:
        return (mask.cumsum(dim=-1) - 1) * mask
    queries, keys = mask.shape[-2:]
    if queries == 1:
        return torch.arange(keys, device=mask.device).expand(mask.shape[0], keys)
    seen = mask[:, 0] == 0  # [B, q, S]
    last = queries - 1 - seen.flip(1).int().argmax(dim=1, keepdim=True)  # [B, 1, S]
    return seen.cumsum(dim=-1).gather(1, last)[:, 0] - 1
