"""Attention of a prefill pass that holds several prompts one behind the other: each prompt alone, causally.

torch's flash kernel knows no mask but the causal one, and a pass of n prompts under a mask takes a slower kernel, which
reads n times what it needs. On a GPU in half precision all prompts go through the flash kernel in one call, whose spans
are a tensor, so that a CUDA graph can hold it; else prompt by prompt, those of one length in a row together. Covers
passes that read nothing of the cache, without position biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The keyword by which transformers' models hand the spans on to attention.
PROMPT_SPANS = "prompt_spans"
# Roundings of sums in another order, in units of the dtype's last place.
_PLACES = 16


@dataclass
class PromptSpans:
    """Where the prompts of one pass of T tokens lie.

    Attributes:
        lengths: of the prompts, in order; their sum is T. Not read where `ends` is there.
        ends: `[n + 1]`, int32, on the device: 0, then each prompt's end; the last ones may all be T. None: there is no
            flash kernel for these prompts.
        longest: no prompt is longer, with `ends`.
        seen: how many layers have attended by these spans.
    """

    lengths: list[int]
    ends: torch.Tensor | None = None
    longest: int = 0
    seen: int = 0


def attend_by_prompt(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    prompt_spans: PromptSpans,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, without a mask: `[1, H, T, D]` and keys `[1, KV, T, D]` -> `[1, T, H, D]`."""
    prompt_spans.seen += 1
    if prompt_spans.ends is not None:
        return flash(query, key, value, scaling, prompt_spans.ends, prompt_spans.longest), None
    runs = [(length, len(list(run))) for length, run in groupby(prompt_spans.lengths)]
    sizes = [length * count for length, count in runs]
    pieces = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (length, count), parts in zip(runs, pieces, strict=True):
        batch = [part[0].unflatten(1, (count, length)).transpose(0, 1) for part in parts]  # [count, heads, length, D]
        output, _ = sdpa_attention_forward(module, *batch, None, scaling=scaling, is_causal=True, **kwargs)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, ends: torch.Tensor, longest: int
) -> torch.Tensor:
    """torch's flash kernel over spans; shapes as of `attend_by_prompt`, half precision, on a GPU."""
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
    found = torch.ops.aten._flash_attention_forward(
        *rows, ends, ends, longest, longest, 0.0, True, False, scale=scaling
    )
    return found[0][None]


@cache
def has_flash(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether `flash` gives the same numbers as prompt by prompt, tried on random ones."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    lengths = [5, 12, 20]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 37, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2)
    )
    groups = nn.Module()
    groups.num_key_value_groups = 2  # type: ignore[assignment]  # read where keys must be repeated
    try:
        with torch.inference_mode():
            expected, _ = attend_by_prompt(groups, query, key, value, None, PromptSpans(lengths))
            ends = torch.tensor([0, 5, 17, 37, 37], dtype=torch.int32, device=device)
            found = flash(query, key, value, None, ends, 37)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, TypeError):  # another torch, another card, a head size without a kernel
        return False
    places = _PLACES * torch.finfo(dtype).eps
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=places, atol=places)
