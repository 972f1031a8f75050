"""Attention over pages on a GPU, by Triton kernels that find their keys through block tables.

Steps that decode alone split each text over programs whose parts are put together afterwards, so that few texts keep a
GPU busy. Other steps read tiles of each segment's tokens. Shapes depend on the number of tokens and segments alone, and
never on the length of a text, so that CUDA graphs can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from dsserve.core.step_input import StepInput
from dsserve.kernels.host_copy import move
from dsserve.kv.block_tables import BlockTables

# A text of more tokens in one program would hold up a step; then all texts are split into so many parts at least.
LONG = 4096
_LONG_PARTS = 32


@dataclass
class TritonMeta:
    """Attributes:
    rows, lengths: `[n]`, int64, on the device; as of `StepInput`.
    starts: `[n + 1]`; None where all n segments have one token.
    is_long: some text is so long that one program would hold up a step that decodes it.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None
    is_long: bool = False


class TritonAttention:
    """See `backend.AttentionBackend`; gets all cells, `[1, KV, cells, D]`."""

    def __init__(self, tables: BlockTables, device: torch.device) -> None:
        self._tables = tables
        self._device = device

    def describe(self, step: StepInput) -> TritonMeta:
        """What attention knows of a step that is not captured."""
        numbers = np.concatenate([step.rows, step.lengths, step.starts])
        found = move(numbers, self._device)
        count = len(step.rows)
        rows, lengths, starts = found.split([count, count, count + 1])
        if step.decoded < count:
            return TritonMeta(rows, lengths, starts)
        return TritonMeta(rows, lengths, is_long=int(step.lengths.max()) > LONG)

    @staticmethod
    def read(stored: torch.Tensor) -> torch.Tensor:
        """What attention gets of the cache: all cells, `[1, KV, cells, D]`."""
        return stored.transpose(0, 1)[None]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        meta: TritonMeta,
    ) -> torch.Tensor:
        """See `backend.AttentionBackend`."""
        rows, stored = query[0].transpose(0, 1), [tensor[0].transpose(0, 1) for tensor in (keys, values)]
        if meta.starts is None:
            parts = _parts(len(meta.rows), stored[0].shape[1], meta.is_long, self._device)
            return torch.ops.dsserve.decode_pages(
                rows, *stored, self._tables.table, meta.rows, meta.lengths, self._tables.page_tokens, parts, scale
            )
        return torch.ops.dsserve.read_pages(
            rows, *stored, self._tables.table, meta.rows, meta.starts, meta.lengths, self._tables.page_tokens, scale
        )


@torch.library.custom_op("dsserve::decode_pages", mutates_args=())
def decode_pages(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    page_tokens: int,
    parts: int,
    scale: float,
) -> torch.Tensor:
    """See `paged_triton.decode`."""
    from dsserve.attention.paged_triton import decode

    return decode(query, keys, values, table, rows, lengths, page_tokens, parts, scale)


@torch.library.custom_op("dsserve::read_pages", mutates_args=())
def read_pages(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    page_tokens: int,
    scale: float,
) -> torch.Tensor:
    """See `paged_triton.read_segments`."""
    from dsserve.attention.paged_triton import read_segments

    return read_segments(query, keys, values, table, rows, starts, lengths, page_tokens, scale)


def _parts(count: int, kv_heads: int, is_long: bool, device: torch.device) -> int:
    """Into how many parts texts are split in a step that decodes so many."""
    parts = max(1, -(-_blocks(device) // (count * kv_heads)))
    return max(parts, _LONG_PARTS) if is_long else parts


@cache
def _blocks(device: torch.device) -> int:
    """How many programs keep the GPU busy: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def has_triton() -> bool:
    """Whether the kernels can be had."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
