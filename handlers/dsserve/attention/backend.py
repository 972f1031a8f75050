"""Attention over pages as a model sees it, and what a backend has to do for it.

A model that uses transformers' attention interface, and hands keywords on to it, computes all segments of a step in one
packed pass `[1, T]`: prompts, parts of prompts and decoded tokens alike. Each token sees the keys of its own text that
lie before it, and needs no mask. Other models go through `runner.masked_pass`. Knows no plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dsserve_pages"
# The keyword by which transformers' models hand a step on to attention.
STEP = "paged_step"
# Keywords with which attention is another one.
_OTHER = ("position_bias", "softcap", "s_aux")


class AttentionBackend(Protocol):
    """Attention of one device."""

    def attend(
        self, module: nn.Module, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, meta: Any
    ) -> torch.Tensor:
        """`[T, H, D]`, zeros for padding.

        Args:
            query: `[1, H, T, D]`.
            keys, values: what the cache's window gave, see `PagedStep.reads_pages`.
            meta: of this step, the backend's own.
        """


def read_cells(stored: torch.Tensor) -> torch.Tensor:
    """`[1, KV, cells, D]`: what attention reads of a layer's stored keys or values `[cells, KV, D]`."""
    return stored.transpose(0, 1)[None]


def stored_cells(found: torch.Tensor) -> torch.Tensor:
    """The layer's keys or values that `read_cells` was given."""
    return found[0].transpose(0, 1)


@dataclass
class PagedStep:
    """One pass, as its attention layers see it.

    Attributes:
        backend, meta: who attends, and what it knows of the step.
        seen: how many layers have attended.
        refused: some layer wanted another kind of attention.
    """

    backend: AttentionBackend
    meta: Any
    seen: int = 0
    refused: bool = False


def use_paged_attention(module: nn.Module) -> bool:
    """Switches a model from torch's attention to this one; False where it uses another. Without a step the model
    computes what it did before."""
    config = module.config.get_text_config()  # type: ignore[operator, union-attr]
    if config._attn_implementation != "sdpa":
        return config._attn_implementation == NAME
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True


def use_torch_attention(module: nn.Module) -> None:
    """Undoes `use_paged_attention`."""
    config = module.config.get_text_config()  # type: ignore[operator, union-attr]
    if config._attn_implementation == NAME:
        config._attn_implementation = "sdpa"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[n, H, T, D]` -> `[n, T, H, D]`."""
    step: PagedStep | None = kwargs.pop(STEP, None)
    if step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    step.seen += 1
    # A model that makes a mask of its own, though none was asked for, hides more than what lies ahead.
    step.refused |= attention_mask is not None or any(kwargs.get(name) is not None for name in _OTHER)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.backend.attend(module, query, key, value, scale, step.meta)[None], None
