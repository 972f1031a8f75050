"""Attention of one new token a row over the KV slots, as a Triton kernel for GPUs.

torch's attention with a mask reads every row up to the length of the longest one, repeats grouped KV heads in memory,
and gives each head to one block, which leaves most of a GPU idle at few rows. Here a row's heads share what they read,
tiles that the mask hides are skipped, and a row is split over blocks whose parts are put together afterwards
(flash-decoding, Dao et al. 2023). Covers decode steps of models that use transformers' attention interface; prefill
goes to torch, that of several prompts by `prefill`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsserve.attention.prefill import PROMPT_SPANS, attend_by_prompt

NAME = "dsserve_decode"
TILE = 64  # tokens that a block reads at a time


def use_decode_attention(module: nn.Module) -> bool:
    """Switches a model from torch's attention to this one; False where it uses another, or Triton is missing."""
    config = module.config.get_text_config()  # type: ignore[operator, union-attr]
    if config._attn_implementation != "sdpa" or not _has_triton():
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True


def uses_decode_attention(module: nn.Module) -> bool:
    """Whether `use_decode_attention` has switched this model."""
    return module.config.get_text_config()._attn_implementation == NAME  # type: ignore[operator, union-attr]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[n, H, T, D]` and keys `[n, KV, S, D]` -> `[n, T, H, D]`."""
    spans, has_bias = kwargs.pop(PROMPT_SPANS, None), kwargs.get("position_bias") is not None
    if spans is not None and not has_bias:
        return attend_by_prompt(module, query, key, value, scaling, spans, **kwargs)
    plain = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
    if query.shape[2] != 1 or not plain or has_bias:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query, key, value, attention_mask, scale).transpose(1, 2), None


@torch.library.custom_op("dsserve::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one token a row.

    Args:
        query: `[n, H, 1, D]`.
        key: `[n, KV, S, D]`, any strides with whole tokens; H is a multiple of KV.
        value: the same.
        mask: `[n, 1, 1, S]`, added to the scores; -inf hides a position, and each row shows at least one.

    Returns:
        `[n, H, 1, D]`.
    """
    from dsserve.attention.decode_triton import launch

    return launch(query, key, value, mask, scale, TILE, _blocks(query.device))


@decode_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@cache
def _blocks(device: torch.device) -> int:
    """How many blocks keep the GPU busy: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
