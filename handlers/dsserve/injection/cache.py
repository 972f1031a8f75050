"""A transformers Cache that holds numbers only: the keys and values lie in the kernels' workspace.

Models ask it how many tokens came before (positions, masks, `generate`'s bookkeeping).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _CountLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("the kernels keep keys and values")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the kernels keep keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1


class KernelCache(Cache):
    """The number of tokens that the kernels hold of one batch."""

    def __init__(self) -> None:
        self._layer = _CountLayer()
        super().__init__(layers=[self._layer])

    def count(self, tokens: int) -> None:
        """Notes that `tokens` more were computed."""
        self._layer.tokens += tokens


def count_tokens(cache: Cache, tokens: int, like: torch.Tensor) -> None:
    """Tells any cache that `tokens` more were computed.

    A cache of transformers' own (which models make for themselves, as does `generate`) gets keys of one value a token:
    its length is the length of what it holds.
    """
    if isinstance(cache, KernelCache):
        cache.count(tokens)
    else:
        marks = like.new_zeros(1, 1, tokens, 1)
        cache.update(marks, marks, 0)
