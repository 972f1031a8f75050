"""KV slots of our own behind transformers' Cache interface: one row a live request, rows dense from 0.

Both phases write each token to its own cell (the field's slot mapping). What attention reads depends on the pass:

- a prefill whose prompts were not computed before: its own fresh keys;
- a prefill whose prompts were computed in part: a copy of the cells that they may see, or all cells;
- a decode step: views of the live rows, up to the longest one.

Rows behind the slots hold prompts of requests that ended (`prefix_cache`). Does not choose rows (`scheduler`) and knows
no sliding windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from dsserve.kernels.ops import loaded_ops

_ALIGNMENT = 64  # bytes, a cache line


@dataclass
class Window:
    """What the next forward pass reads and writes, shared by all layers.

    Attributes:
        cells: `[n]` where the new tokens go: row * max_len + position. Tokens after the n-th are padding.
        kv_len: how many positions of each row attention reads while decoding, None for prefill.
        read: `[S]` the cells that attention reads in prefill; None = the new tokens are all there is.
        whole: attention gets all cells in prefill, and finds the prompts' own.
    """

    cells: Any = None
    kv_len: int | None = None
    read: Any = None
    whole: bool = False


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, max_len, kv_heads of this rank, head_dim]`, zeros at first.

    A token's heads lie together, so writing a step's tokens is one copy of whole cells.

    The number of heads is taken from the first keys that come: under uneven shards the config's number is not the
    rank's. Zeros, not `empty`: masked positions are multiplied by 0, and 0 * NaN is NaN.
    """

    is_sliding = False

    def __init__(self, rows: int, max_len: int, window: Window) -> None:
        super().__init__()
        self._rows = rows
        self._max_len = max_len
        self._window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def zeros(like: torch.Tensor) -> torch.Tensor:
            return make_zeros((self._rows, self._max_len, like.shape[1], like.shape[3]), like)

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `[B, kv_heads, T, head_dim]` and returns the keys and values that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ops = loaded_ops(self.keys.device)
        if ops is not None:
            ops.store(self.keys, self.values, key_states, value_states, self._window.cells)
        else:
            self._write(self.keys, key_states)
            self._write(self.values, value_states)
        if self._window.kv_len is not None:
            return self._read(self.keys, key_states.shape[0]), self._read(self.values, value_states.shape[0])
        if self._window.whole:
            return self._all(self.keys), self._all(self.values)
        if self._window.read is not None:
            return self._gather(self.keys), self._gather(self.values)
        return key_states, value_states

    def _write(self, stored: torch.Tensor, new: torch.Tensor) -> None:
        """Tokens lie in order, whether they are `[1, kv_heads, T, head_dim]` (prefill) or `[n, kv_heads, 1, ...]`."""
        cells = self._window.cells
        tokens = new.transpose(1, 2).flatten(0, 1)
        stored.flatten(0, 1).index_copy_(0, cells, tokens[: cells.shape[0]])

    def _read(self, stored: torch.Tensor, rows: int) -> torch.Tensor:
        """The view `[rows, kv_heads, kv_len, head_dim]`."""
        return stored[:rows, : self._window.kv_len].transpose(1, 2)

    def _all(self, stored: torch.Tensor) -> torch.Tensor:
        """The view `[1, kv_heads, rows * max_len, head_dim]`."""
        return stored.flatten(0, 1).transpose(0, 1)[None]

    def _gather(self, stored: torch.Tensor) -> torch.Tensor:
        """A copy of the cells to read, `[1, kv_heads, S, head_dim]`."""
        return stored.flatten(0, 1).index_select(0, self._window.read).transpose(0, 1)[None]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row to another."""
        self.keys[target, :length] = self.keys[source, :length]
        self.values[target, :length] = self.values[source, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._max_len


def make_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of `like`'s dtype and device. On a CPU they take memory only where something was written: torch fills its
    zeros, 5 GB a rank for 16 rows of 8192 tokens of SmolLM2 in fp32, while calloc's pages are the kernel's."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _ALIGNMENT, dtype=np.uint8))
    first = -memory.data_ptr() % _ALIGNMENT
    return memory[first : first + size].view(like.dtype).view(shape)


class SlotCache(Cache):
    """All layers' rows and the window they share."""

    def __init__(self, num_layers: int, rows: int, max_len: int) -> None:
        self.window = Window()
        super().__init__(layers=[SlotLayer(rows, max_len, self.window) for _ in range(num_layers)])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the keys and values of a row's first `length` tokens to another row, in every layer."""
        for layer in self.layers:
            layer.copy(source, target, length)

    def nbytes(self) -> int:
        """Bytes reserved on this rank, 0 before the first forward pass."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
