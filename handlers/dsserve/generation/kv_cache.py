"""KV slots of our own behind transformers' Cache interface: one row a live request, rows dense from 0.

Prefill writes one row and hands the model its own fresh keys (causal attention needs no mask); decoding writes one
position in each live row and hands out views up to the longest one. Does not choose rows (`scheduler`) and knows no
sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Window:
    """What the next forward pass reads and writes, shared by all layers.

    Attributes:
        prefill_row: the row that is filled, None while decoding.
        rows: `[n]` 0..n-1, the live rows (decode).
        positions: `[n]` where each row's new token goes (decode).
        kv_len: how many positions attention reads (decode).
    """

    prefill_row: int | None = None
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    kv_len: int = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slots, kv_heads of this rank, max_len, head_dim]`, zeros at first.

    The number of heads is taken from the first keys that come: under uneven shards the config's number is not the
    rank's. Zeros, not `empty`: masked positions are multiplied by 0, and 0 * NaN is NaN. On the CPU untouched pages
    of a zeroed tensor take no memory.
    """

    is_sliding = False

    def __init__(self, slots: int, max_len: int, window: Window) -> None:
        super().__init__()
        self._slots = slots
        self._max_len = max_len
        self._window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def zeros(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(self._slots, like.shape[1], self._max_len, like.shape[3])

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `[B, kv_heads, T, head_dim]` and returns the keys and values that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._window
        if window.prefill_row is not None:
            length = key_states.shape[2]
            self.keys[window.prefill_row, :, :length] = key_states[0]
            self.values[window.prefill_row, :, :length] = value_states[0]
            return key_states, value_states
        live = key_states.shape[0]
        self.keys[window.rows, :, window.positions] = key_states[:, :, 0]
        self.values[window.rows, :, window.positions] = value_states[:, :, 0]
        return self.keys[:live, :, : window.kv_len], self.values[:live, :, : window.kv_len]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row to another."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._max_len


class SlotCache(Cache):
    """All layers' slots and the window they share."""

    def __init__(self, num_layers: int, slots: int, max_len: int) -> None:
        self.window = Window()
        super().__init__(layers=[SlotLayer(slots, max_len, self.window) for _ in range(num_layers)])

    def move(self, source: int, target: int, length: int) -> None:
        """Moves one request's keys and values to another row, in every layer."""
        for layer in self.layers:
            layer.move(source, target, length)

    def nbytes(self) -> int:
        """Bytes reserved on this rank, 0 before the first forward pass."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
