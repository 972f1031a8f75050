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

from dsserve.attention.backend import stored_cells
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
        from dsserve.attention import paged_triton  # Triton is not there everywhere

        rows, keys, values = query[0].transpose(0, 1), stored_cells(keys), stored_cells(values)
        if meta.starts is None:
            parts = _parts(len(meta.rows), keys.shape[1], meta.is_long, self._device)
            return paged_triton.decode(
                rows, keys, values, self._tables.table, meta.rows, meta.lengths, self._tables.page_tokens, parts, scale
            )
        return paged_triton.read_segments(
            rows,
            keys,
            values,
            self._tables.table,
            meta.rows,
            meta.starts,
            meta.lengths,
            self._tables.page_tokens,
            scale,
        )


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
