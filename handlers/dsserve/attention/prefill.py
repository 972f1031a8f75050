"""Attention of a prefill pass that holds several prompts one behind the other: each prompt alone, causally.

torch's flash kernel knows no mask but the causal one, and a pass of n prompts under a mask takes a slower kernel, which
reads n times what it needs. On a GPU in half precision all prompts go through the flash kernel in one call, which finds
their keys in the KV cache by spans that are a tensor: a CUDA graph can hold it, and what was computed before is read
where it lies. Else prompt by prompt, those of one length in a row together, if nothing is read of the cache. Knows no
position biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
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
        lengths: of the prompts, in order; their sum is T. Not read where there is a table.
        table: `[3, n + 1]`, int32, on the device; None: attention gets the pass's own keys. The rows are
            `cu_seqlens_q` (0, then each prompt's end in the pass; unused ends are T), the first cell of each prompt's
            keys, and `seqused_k` (how many keys a prompt sees; its own tokens are the last).
        longest: upper bound of a prompt's tokens in the pass (`max_seqlen_q`); with a table.
        most: upper bound of a prompt's keys (`max_seqlen_k`); with a table.
        seen: how many layers have attended by these spans.
    """

    lengths: list[int]
    table: torch.Tensor | None = None
    longest: int = 0
    most: int = 0
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
    """transformers' attention interface, without a mask: `[1, H, T, D]` and keys `[1, KV, T, D]`, with a table those of
    all cells of the cache, -> `[1, T, H, D]`."""
    prompt_spans.seen += 1
    if prompt_spans.table is not None:
        return flash(query, key, value, scaling, prompt_spans), None
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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, spans: PromptSpans
) -> torch.Tensor:
    """torch's flash kernel over a table of spans; shapes as of `attend_by_prompt`, half precision, on a GPU.

    Its causal mask lets a prompt's last token see all of its keys (flash-attention from 2.1 on).
    """
    assert spans.table is not None
    ends, firsts, counts = spans.table
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T or cells, heads, D]
    found = torch.ops.aten._flash_attention_forward(
        *rows, ends, firsts, spans.longest, spans.most, 0.0, True, False, scale=scaling, seqused_k=counts[:-1]
    )
    return found[0][None]


@cache
def has_flash(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether `flash` gives the numbers of attention under a mask, tried on random ones: three prompts, of which two
    find a part of their keys in the cache, and padding."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    lengths, firsts, counts = [5, 12, 20, 3], [40, 0, 64, 0], [5, 15, 28, 0]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, head_dim, generator=generator).to(device, dtype)
        for heads, tokens in ((4, sum(lengths)), (2, 96), (2, 96))
    )
    table = torch.tensor([[0, 5, 17, 37, 40], [*firsts, 0], [*counts, 0]], dtype=torch.int32, device=device)
    expected = []
    for part, first, count in zip(query.split(lengths, dim=2), firsts, counts, strict=True):
        seen = torch.ones(part.shape[2], count, dtype=torch.bool, device=device).tril(count - part.shape[2])
        keys, values = (tensor[:, :, first : first + count] for tensor in (key, value))
        out = F.scaled_dot_product_attention(part, keys, values, seen, enable_gqa=True) if count else part * 0
        expected.append(out.transpose(1, 2))
    try:
        with torch.inference_mode():
            found = flash(query, key, value, None, PromptSpans(lengths, table, 40, 32))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, TypeError):  # another torch, another card, a head size without a kernel
        return False
    places = _PLACES * torch.finfo(dtype).eps
    return torch.allclose(found, torch.cat(expected, dim=1), rtol=places, atol=places)
