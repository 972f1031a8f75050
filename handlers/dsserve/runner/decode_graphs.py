"""Decode steps as CUDA graphs: one launch instead of some hundred, for each number of rows and length of the cache.

A graph is captured for every (rows, cache length) bucket; a step takes the smallest that fits. Rows beyond the decoded
ones write where the next prompt, or the next part of one, overwrites it. Prefill is `prefill_graphs`'s. Does not
sample.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsserve.kernels.cuda_graph import buckets, capture
from dsserve.kernels.host_copy import stage

logger = logging.getLogger(__name__)

# Cache lengths double from here to the whole context.
_SHORTEST = 128

# (tokens [n], positions [n], cache length) -> logits [n, V], all on the device
Forward = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class _Captured:
    """One graph with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # [2, rows], int64: tokens, positions
    logits: torch.Tensor  # [rows, V]


class DecodeGraphs:
    """The captured steps of one model; all ranks capture and replay them in the same order.

    Args:
        forward: one decode step on device tensors, without a word to the host.
        slots: most live rows.
        capacity: longest row of the cache, in tokens.
    """

    def __init__(self, forward: Forward, slots: int, capacity: int, device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._rows, self._lengths = _shapes(slots, capacity)
        self._captured: dict[tuple[int, int], _Captured] = {}

    @torch.inference_mode()
    def capture(self, is_leader: bool, pool: object) -> None:
        """Captures every bucket, the largest first, since the others can use its memory again.

        Args:
            pool: `torch.cuda.graph_pool_handle()`, shared by graphs that never run at the same time.

        Raises:
            LoadError: the model does something that a graph cannot hold.
        """
        started, reserved = time.perf_counter(), torch.cuda.memory_reserved(self._device)
        shapes = list(itertools.product(reversed(self._rows), reversed(self._lengths)))
        for index, (rows, length) in enumerate(shapes, start=1):
            self._captured[rows, length] = self._capture_one(rows, length, pool)
            if is_leader and index in (1, len(shapes)):
                seconds = time.perf_counter() - started
                grown = (torch.cuda.memory_reserved(self._device) - reserved) / 2**30
                logger.info("[dsserve] CUDA graphs: %d of %d, %.1f s, %.2f GiB", index, len(shapes), seconds, grown)

    def _capture_one(self, rows: int, length: int, pool: object) -> _Captured:
        inputs = torch.zeros(2, rows, dtype=torch.int64, device=self._device)
        graph, logits = capture(lambda: self._forward(inputs[0], inputs[1], length), pool, self._device)
        return _Captured(graph, inputs, logits)

    def decode(self, tokens: tuple[int, ...], positions: list[int], known: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[n, V]` of one step for the rows 0 to n-1. Does not wait for the device.

        Args:
            positions: where the next token of each live row goes; of more than n rows where prompts are not complete.
            known: in the place of `tokens`, `[n]`, int64, where they are on the device already.
        """
        decoded = len(tokens)
        rows = next(bucket for bucket in self._rows if bucket >= decoded)
        length = next(bucket for bucket in self._lengths if bucket > max(positions[:decoded]))
        captured = self._captured[rows, length]
        inputs = stage(pad_rows(tokens, positions, rows), torch.int64, self._device)
        captured.inputs.copy_(inputs, non_blocking=True)
        if known is not None:
            captured.inputs[0, :decoded].copy_(known)
        captured.graph.replay()
        # The next replay overwrites what the graph wrote.
        return captured.logits[:decoded].clone()


def captured_rows(slots: int, capacity: int) -> int:
    """Rows of logits that all graphs together hold; arguments as `DecodeGraphs`'."""
    rows, lengths = _shapes(slots, capacity)
    return sum(rows) * len(lengths)


def _shapes(slots: int, capacity: int) -> tuple[list[int], list[int]]:
    return buckets(1, slots), buckets(min(_SHORTEST, capacity), capacity)


def pad_rows(tokens: tuple[int, ...], positions: list[int], rows: int) -> list[list[int]]:
    """Tokens and positions of `rows` rows. Those beyond the tokens are free, and written at position 0, or hold a part
    of a prompt, and are written where its next part begins."""
    padded = [*positions, *[0] * rows][:rows]
    return [[*tokens, *[0] * (rows - len(tokens))], padded]
