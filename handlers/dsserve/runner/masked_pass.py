"""A step of a model whose attention is its own (a position bias, capped scores): under masks `[B, 1, T, S]`.

Decoded texts are a batch of rows `[n, 1]`, prompts one packed row `[1, T]`, as two passes. Each reads a copy of the
cells that its tokens may see. Slower than `forward_pass`, and for every model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dsserve.core.step_input import StepInput, padded_length
from dsserve.kernels.host_copy import move
from dsserve.kv.block_tables import BlockTables
from dsserve.kv.store import PagedCache
from dsserve.modeling.dtype import model_dtype
from dsserve.runner.forward_pass import fill_sources

_PADDING = -1  # the text of padding: one more, which sees itself; a token that sees nothing would be NaN
# Decoded texts read up to the longest of them, rounded up to this.
_KV_STEP = 16


class MaskedPass:
    """The model with its cache; see `forward_pass.PackedPass`."""

    def __init__(self, module: Any, cache: PagedCache, tables: BlockTables, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._dtype = model_dtype(module)
        self.cache = cache
        self.tables = tables

    def run(self, step: StepInput, known: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[W, V]`, see `PackedPass.run`."""
        tokens = move(step.tokens, self._device)
        fill_sources(tokens, step, known)
        decoded, parts = step.decoded, []
        if decoded:
            logits = self._decode(step, tokens[:decoded])
            parts.append(logits[move(step.wanted[step.wanted < decoded], self._device)])
        if decoded < len(step.rows):
            parts.append(self._prefill(step, tokens[decoded:]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode(self, step: StepInput, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[decoded, V]`."""
        count = len(tokens)
        lengths = move(step.lengths[:count], self._device)
        rows = move(step.rows[:count], self._device)
        longest = min(-(-int(step.lengths[:count].max()) // _KV_STEP) * _KV_STEP, self.tables.most_tokens)
        columns = torch.arange(longest, device=self._device)
        read = self.tables.cells(rows[:, None], columns[None])  # [n, S]
        window = self.cache.window
        window.cells = self.tables.cells(rows, lengths - 1)
        window.read = lambda stored: stored[read].transpose(1, 2)  # [n, KV, S, D]
        mask = self._mask(columns >= lengths[:, None])[:, None, None]  # [n, 1, 1, S]
        return self._forward(tokens[:, None], (lengths - 1)[:, None], mask).logits[:, -1]

    def _prefill(self, step: StepInput, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[W, V]` of the wanted tokens behind the decoded ones."""
        decoded = step.decoded
        sizes, lengths, rows = step.sizes[decoded:], step.lengths[decoded:], step.rows[decoded:]
        total = len(tokens)
        padding = padded_length(total) - total
        positions = self._to_device(step.positions[decoded:], padding, 0)
        texts = self._to_device(np.repeat(np.arange(len(sizes)), sizes), padding, _PADDING)
        window = self.cache.window
        window.cells = self.tables.cells(move(np.repeat(rows, sizes), self._device), positions[:total])
        window.read, seen, whose = None, positions, texts
        if lengths.sum() > total:
            behind = padded_length(int(lengths.sum()) + 1) - int(lengths.sum())
            seen = self._to_device(np.concatenate([np.arange(length) for length in lengths]), behind, 0)
            whose = self._to_device(np.repeat(np.arange(len(lengths)), lengths), behind, _PADDING)
            owners = self._to_device(np.repeat(rows, lengths), behind, self.tables.padding)
            read = self.tables.cells(owners, seen)
            window.read = lambda stored: stored.index_select(0, read).transpose(0, 1)[None]  # [1, KV, S, D]
        mask = None  # one prompt alone needs none: attention is causal, padding lies behind
        if len(sizes) > 1 or window.read is not None:
            mask = self._mask((texts[:, None] != whose) | (positions[:, None] < seen))[None, None]  # [1, 1, T, S]
        padded = torch.nn.functional.pad(tokens, (0, padding))
        wanted = move(step.wanted[step.wanted >= decoded] - decoded, self._device)
        return self._forward(padded[None], positions[None], mask, logits_to_keep=wanted).logits[0]

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> Any:
        return self._module(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        """Additive."""
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))

    def _to_device(self, numbers: np.ndarray, padding: int, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(move(numbers, self._device), (0, padding), value=value)
