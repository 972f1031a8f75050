"""Attention of a prefill pass that holds several prompts one behind the other: each prompt alone, causally.

torch's flash kernel knows no mask but the causal one. A pass of n prompts under a mask takes a slower kernel, which
reads n times what it needs; prompts of one length in a row go through the flash kernel together. Covers passes that
read nothing of the cache, without position biases.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The keyword by which transformers' models hand the prompts' lengths on to attention.
PROMPT_LENGTHS = "prompt_lengths"


def attend_by_prompt(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    prompt_lengths: list[int],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, without a mask: `[1, H, T, D]` and keys `[1, KV, T, D]` -> `[1, T, H, D]`.

    Args:
        prompt_lengths: of the prompts, in order; their sum is T.
    """
    runs = [(length, len(list(run))) for length, run in groupby(prompt_lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(
        runs, *(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True
    ):
        batch = [part[0].unflatten(1, (count, length)).transpose(0, 1) for part in parts]  # [count, heads, length, D]
        output, _ = sdpa_attention_forward(module, *batch, None, scaling=scaling, is_causal=True, **kwargs)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None
