"""The LM head split by rows of the vocabulary (CPU engine), where DeepSpeed splits it by columns, like the heads.

A decode step waits for the rank that reads the most bytes. Heads that do not divide evenly (SmolLM2's 9 over 2 ranks:
6 and 3) load one rank with up to twice the attention weights, and DeepSpeed's head repeats that split. Rows can be
dealt out freely, and their logits are whole: no partial sums are rounded. Does not pack weights (`packing`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsserve.distributed import RankInfo, all_reduce

# Rows are dealt out in blocks of this many; also what is gathered at a time when the layout changes.
_BLOCK = 64
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


def split_vocabulary(rows: int, row_bytes: int, other_bytes: int) -> tuple[int, int]:
    """This rank's first row and the one after its last.

    Args:
        rows: size of the vocabulary.
        row_bytes: bytes of one row of the whole head.
        other_bytes: what this rank reads in a step beside the head.
    """
    rank = RankInfo.from_env()
    loads = [0] * rank.world_size
    torch.distributed.all_gather_object(loads, other_bytes)
    counts = balance(rows, row_bytes, loads)
    start = sum(counts[: rank.rank])
    return start, start + counts[rank.rank]


def balance(rows: int, row_bytes: int, loads: list[int]) -> list[int]:
    """How many of `rows` each rank takes so that the largest load gets as small as it can, in blocks of rows."""
    totals, counts = list(loads), [0] * len(loads)
    while rows > 0:
        block = min(_BLOCK, rows)
        lightest = totals.index(min(totals))
        totals[lightest] += block * row_bytes
        counts[lightest] += block
        rows -= block
    return counts


def gather_rows(head: Any, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows `start` to `stop` of DeepSpeed's column-split head, `[stop - start, hidden]`, and their bias.

    All ranks take part; a slice of the vocabulary at a time, so that the whole head never lies on one rank.
    """
    first = sum(head._partition_sizes[: head.tp_index])
    hidden, size = sum(head._partition_sizes), head._partition_sizes[head.tp_index]
    parts = []
    for at in range(0, head.weight.shape[0], _GATHERED_ROWS):
        own = head.weight.detach()[at : at + _GATHERED_ROWS]
        whole = own.new_zeros(own.shape[0], hidden)
        whole.narrow(1, first, size).copy_(own)
        all_reduce(whole)  # every column is zero on all ranks but one, so the sum is exact
        parts.append(whole[max(0, start - at) : max(0, stop - at)])
    bias = None if head.bias is None else head.bias.detach()[start:stop]
    return torch.cat(parts), bias
