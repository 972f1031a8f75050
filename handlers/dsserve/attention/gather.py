"""Attention over pages by torch's own kernels, on copies of what each segment sees. Decoded tokens go through compiled
C++ on a CPU, which reads the pages where they lie.

Covers every device and dtype; GPUs have `triton_pages`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dsserve.attention.backend import stored_cells
from dsserve.core.step_input import StepInput
from dsserve.kernels.ops import loaded_ops
from dsserve.kv.block_tables import BlockTables


@dataclass
class _Part:
    """A segment of several tokens: its place in the pass, the cells of all keys that it sees `[S]`, and which of them
    each of its tokens sees `[T, S]`."""

    begin: int
    end: int
    cells: torch.Tensor
    seen: torch.Tensor


@dataclass
class GatherMeta:
    """Attributes:
    total: tokens without padding.
    runs: where nothing is read of the cache, (tokens, how many segments of so many) in order.
    decoded: how many of the first tokens are segments of their own.
    rows, lengths: theirs, `[decoded]`, int64.
    cells, seen: where C++ does not read them: the cells of their keys `[decoded, S]`, and which they see.
    parts: the other segments.
    """

    total: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    decoded: int = 0
    rows: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    cells: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    parts: list[_Part] = field(default_factory=list)


class GatherAttention:
    """See `backend.AttentionBackend`."""

    def __init__(self, tables: BlockTables, device: torch.device) -> None:
        self._tables = tables
        self._device = device

    def describe(self, step: StepInput) -> GatherMeta:
        """What attention knows of a step; `step.fresh` says whether it gets the fresh keys alone, or all cells."""
        meta = GatherMeta(step.total)
        sizes = step.sizes.tolist()
        if step.fresh:
            meta.runs = [(size, len(list(run))) for size, run in groupby(sizes)]
            return meta
        meta.decoded = step.decoded
        if step.decoded:
            self._describe_decoded(step, meta)
        for number in range(step.decoded, len(sizes)):
            length, size = int(step.lengths[number]), sizes[number]
            positions = torch.arange(length, device=self._device)
            row = torch.full_like(positions, int(step.rows[number]))
            seen = torch.ones(size, length, dtype=torch.bool, device=self._device).tril(length - size)
            begin = int(step.starts[number])
            meta.parts.append(_Part(begin, begin + size, self._tables.cells(row, positions), seen))
        return meta

    def _describe_decoded(self, step: StepInput, meta: GatherMeta) -> None:
        meta.rows = torch.from_numpy(step.rows[: step.decoded]).to(self._device)
        meta.lengths = torch.from_numpy(step.lengths[: step.decoded]).to(self._device)
        if _paged_op(self._device) is None:
            positions = torch.arange(int(step.lengths[: step.decoded].max()), device=self._device)
            meta.cells = self._tables.cells(meta.rows[:, None], positions[None])
            meta.seen = (positions[None] < meta.lengths[:, None])[:, None, None]  # [n, 1, 1, S]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        meta: GatherMeta,
    ) -> torch.Tensor:
        """See `backend.AttentionBackend`."""
        if meta.runs:
            found = _attend_fresh(module, query, keys, values, scale, meta.runs)
        else:
            stored = [stored_cells(tensor) for tensor in (keys, values)]  # [cells, KV, D]
            pieces = [self._attend_decoded(module, query, stored, scale, meta)] if meta.decoded else []
            for part in meta.parts:
                own = [tensor.index_select(0, part.cells).transpose(0, 1)[None] for tensor in stored]
                out, _ = sdpa_attention_forward(
                    module, query[:, :, part.begin : part.end], *own, part.seen[None, None], scaling=scale
                )
                pieces.append(out[0])
            found = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        padding = query.shape[2] - meta.total
        return torch.nn.functional.pad(found, (0, 0, 0, 0, 0, padding)) if padding else found

    def _attend_decoded(
        self, module: nn.Module, query: torch.Tensor, stored: list[torch.Tensor], scale: float, meta: GatherMeta
    ) -> torch.Tensor:
        """`[decoded, H, D]`."""
        rows = query[0, :, : meta.decoded].transpose(0, 1)  # [n, H, D]
        op = _paged_op(self._device)
        if op is not None:
            return op(rows, *stored, self._tables.table, meta.rows, meta.lengths, self._tables.page_tokens, scale)
        assert meta.cells is not None
        own = [tensor[meta.cells].transpose(1, 2) for tensor in stored]  # [n, KV, S, D]
        out, _ = sdpa_attention_forward(module, rows[:, :, None], *own, meta.seen, scaling=scale)
        return out[:, 0]


def _attend_fresh(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    runs: list[tuple[int, int]],
) -> torch.Tensor:
    """Each segment sees itself alone, causally; those of one length in a row are computed together."""
    sizes = [length * count for length, count in runs]
    total = sum(sizes)
    pieces = zip(*(tensor[:, :, :total].split(sizes, dim=2) for tensor in (query, keys, values)), strict=True)
    outputs = []
    for (length, count), parts in zip(runs, pieces, strict=True):
        batch = [part[0].unflatten(1, (count, length)).transpose(0, 1) for part in parts]  # [count, heads, length, D]
        output, _ = sdpa_attention_forward(module, *batch, None, scaling=scale, is_causal=True)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)


def _paged_op(device: torch.device) -> Any:
    """The compiled operation that decodes over pages, where there is one."""
    ops = loaded_ops(device) if device.type == "cpu" else None
    return None if ops is None else ops.paged_attention
