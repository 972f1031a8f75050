"""The LM head split by rows of the vocabulary (CPU engine), where DeepSpeed splits it by columns, like the heads.

DeepSpeed's column split follows the attention heads, so that heads that do not divide evenly (SmolLM2's 9 over 2 ranks:
6 and 3) give one rank two thirds of the largest matrix, and every step waits for it. Rows are split evenly, and their
logits are whole: no partial sums are rounded. Does not pack weights (`modeling.linear`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsserve.parallel.collectives import all_reduce

# Rows that are gathered at a time while the layout changes.
_GATHERED_ROWS = 4096


class VocabParallelHead(nn.Module):
    """Logits of all ranks' rows, complete on every rank.

    Args:
        linear: this rank's rows, `[..., hidden]` -> `[..., rows]`.
        start: its first row.
        vocabulary: number of rows of all ranks.
    """

    def __init__(self, linear: nn.Module, start: int, vocabulary: int) -> None:
        super().__init__()
        self._linear = linear
        self._start = start
        self._vocabulary = vocabulary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` -> `[..., vocabulary]`."""
        own = self._linear(x)
        logits = own.new_zeros(*own.shape[:-1], self._vocabulary)
        logits.narrow(-1, self._start, own.shape[-1]).copy_(own)
        return all_reduce(logits)


def split_evenly(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's first row and the one after its last; sizes differ by one row at most."""
    return rows * rank // world_size, rows * (rank + 1) // world_size


def gather_rows(head: Any) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """This rank's rows of DeepSpeed's column-split head, `[rows, hidden]`, their bias, and the first row's index.

    All ranks take part; a slice of the vocabulary at a time, so that the whole head never lies on one rank.
    """
    sizes = head._partition_sizes
    start, stop = split_evenly(head.weight.shape[0], head.tp_index, len(sizes))
    first, parts = sum(sizes[: head.tp_index]), []
    for at in range(0, head.weight.shape[0], _GATHERED_ROWS):
        own = head.weight.detach()[at : at + _GATHERED_ROWS]
        whole = own.new_zeros(own.shape[0], sum(sizes))
        whole.narrow(1, first, own.shape[1]).copy_(own)
        all_reduce(whole)  # every column is zero on all ranks but one, so the sum is exact
        parts.append(whole[max(0, start - at) : max(0, stop - at)])
    bias = None if head.bias is None else head.bias.detach()[start:stop]
    return torch.cat(parts), bias, start
