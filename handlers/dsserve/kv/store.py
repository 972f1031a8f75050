"""The tensors of the KV cache behind transformers' Cache interface: pages of cells, a cell for each token.

A pass writes each token to its own cell (the field's slot mapping). What attention gets depends on the pass: the fresh
keys and values alone, all cells, or a copy of some. Does not choose pages (`kv.manager`) and knows no texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from dsserve.kernels.ops import loaded_ops

_ALIGNMENT = 64  # bytes, a cache line


@dataclass
class Window:
    """What the next forward pass writes and reads, shared by all layers.

    Attributes:
        cells: `[n]`, int64, where the first n tokens go: page * page_tokens + place in it. Others are padding.
        read: of a layer's keys or values `[cells, kv_heads, head_dim]` what attention gets; None = the fresh ones.
    """

    cells: Any = None
    read: Callable[[torch.Tensor], torch.Tensor] | None = None


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer, `[cells, kv_heads of this rank, head_dim]`, zeros at first.

    A token's heads lie together, so writing a step's tokens is one copy of whole cells.

    The number of heads is taken from the first keys that come: under uneven shards the config's number is not the
    rank's. Zeros, not `empty`: masked positions are multiplied by 0, and 0 * NaN is NaN.
    """

    is_sliding = False

    def __init__(self, cells: int, window: Window) -> None:
        super().__init__()
        self._cells = cells
        self._window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def zeros(like: torch.Tensor) -> torch.Tensor:
            return make_zeros((self._cells, like.shape[1], like.shape[3]), like)

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `[B, kv_heads, T, head_dim]` and returns the keys and values that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ops = loaded_ops(self.keys.device)
        if ops is not None and key_states.shape == value_states.shape:
            ops.store(self.keys, self.values, key_states, value_states, self._window.cells)
        else:
            self._write(self.keys, key_states)
            self._write(self.values, value_states)
        read = self._window.read
        return (key_states, value_states) if read is None else (read(self.keys), read(self.values))

    def _write(self, stored: torch.Tensor, new: torch.Tensor) -> None:
        """Tokens lie in order, whether they are `[1, kv_heads, T, head_dim]` or `[n, kv_heads, 1, head_dim]`."""
        cells = self._window.cells
        tokens = new.transpose(1, 2).flatten(0, 1)
        stored.index_copy_(0, cells, tokens[: cells.shape[0]])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._cells


def make_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of `like`'s dtype and device. On a CPU they take memory only where something was written: torch fills its
    zeros, while calloc's pages are the kernel's."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _ALIGNMENT, dtype=np.uint8))
    first = -memory.data_ptr() % _ALIGNMENT
    return memory[first : first + size].view(like.dtype).view(shape)


class PagedCache(Cache):
    """All layers' cells and the window they share."""

    def __init__(self, num_layers: int, cells: int) -> None:
        self.window = Window()
        super().__init__(layers=[PagedLayer(cells, self.window) for _ in range(num_layers)])

    def nbytes(self) -> int:
        """Bytes reserved on this rank, 0 before the first forward pass."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
