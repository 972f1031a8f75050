"""Prefill as CUDA graphs: a pass of up to some thousand tokens is bound by launches, not by arithmetic.

A graph is captured for every padded length, and for some lengths of what a pass reads of the cache. Where attention
knows the prompts' spans (`prompt_attention`) they are one of its inputs; else its mask is made within it from positions
and prompt numbers, which pays for short passes alone. Covers passes that want the logits of each prompt's last token;
`model_runner` runs all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsserve.generation.cuda_graphs import buckets, capture
from dsserve.generation.packed_prompts import PADDING, PREFILL_BUCKETS, PackedPrompts, prefill_bucket

# Under a mask. Measured on an H200, 6.7 billion parameters: 128 tokens take 5.4 ms in a graph and 18 without, 500 take
# 25 and 19, since attention under a mask does not run in torch's flash kernel.
_LONGEST = 256
# With spans. The same shape's eager pass of 1024 tokens takes 57 ms on an H100 with TP=2, of which most is the host's.
_MORE_LENGTHS = (768, 1024, 1536, 2048, 3072, 4096)
# Passes that read the cache are padded to one of these: each is captured for all lengths of what they read.
_PARTS = (64, 128, 256)
# Those lengths double from the first to the last; passes that read more run eagerly: a graph holds its mask and a copy
# of a layer's keys and values, which would be gigabytes for the longest contexts.
_SHORTEST_READ, _LONGEST_READ = 512, 4096

# (tokens, positions, cells and prompt numbers [4, T]; wanted [W]; cells, positions and prompt numbers [3, S] of what is
# read of the cache, or None; 0 and the ends of the prompts' spans [N], int32, or None) -> logits [W, V], all on the
# device
Forward = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class _Captured:
    """One graph with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # [4, T], int64
    wanted: torch.Tensor  # [W], int64
    read: torch.Tensor | None  # [3, S], int64
    ends: torch.Tensor | None  # [N], int32
    logits: torch.Tensor  # [W, V]


class PrefillGraphs:
    """The captured passes of one model; all ranks capture and replay them in the same order.

    Args:
        forward: one pass on device tensors, without a word to the host; writes nothing to negative cells.
        most: most prompts of a pass.
        longest: longest prompt, in tokens.
        by_prompt: attention takes the prompts' spans, where nothing is read of the cache.
    """

    def __init__(
        self, forward: Forward, most: int, longest: int, device: torch.device, by_prompt: bool = False
    ) -> None:
        self._forward = forward
        self._most = most
        self._device = device
        self._by_prompt = by_prompt
        possible = (*PREFILL_BUCKETS, *_MORE_LENGTHS) if by_prompt else PREFILL_BUCKETS
        largest = min(prefill_bucket(most * longest), _MORE_LENGTHS[-1] if by_prompt else _LONGEST)
        self._lengths = [length for length in possible if length <= largest]
        self._parts = [length for length in _PARTS if length in self._lengths]
        most_read = min(prefill_bucket(longest + 1), _LONGEST_READ)
        self._reads = buckets(_SHORTEST_READ, max(_SHORTEST_READ, most_read))
        self._captured: dict[tuple[int, int], _Captured] = {}  # (T, S); S is 0 where nothing is read

    @torch.inference_mode()
    def capture(self, pool: object) -> None:
        """Captures every length, the longest first; `pool` as `DecodeGraphs.capture` takes it.

        Raises:
            LoadError: see `cuda_graphs.capture`.
        """
        for read in reversed([0, *self._reads]):
            for length in reversed(self._parts if read else self._lengths):
                self._captured[length, read] = self._capture_one(length, read, pool)

    def _capture_one(self, length: int, read_length: int, pool: object) -> _Captured:
        inputs = torch.zeros(4, length, dtype=torch.int64, device=self._device)
        inputs[2] = -1
        wanted = torch.zeros(min(self._most, length), dtype=torch.int64, device=self._device)
        read = torch.zeros(3, read_length, dtype=torch.int64, device=self._device) if read_length else None
        ends = None
        if self._by_prompt and read is None:  # the prompts' and the padding's
            ends = torch.full((len(wanted) + 2,), length, dtype=torch.int32, device=self._device)
            ends[0] = 0
        graph, logits = capture(lambda: self._forward(inputs, wanted, read, ends), pool, self._device)
        return _Captured(graph, inputs, wanted, read, ends, logits)

    def run(self, packed: PackedPrompts) -> torch.Tensor | None:
        """Logits `[n, V]` of the last tokens of n prompts, or None for a pass that was not captured."""
        captured = self._find(packed)
        count = len(packed.wanted)
        if captured is None or packed.wants_all or count > len(captured.wanted):
            return None
        rows = [(packed.tokens, 0), (packed.positions, 0), (packed.cells, -1), (packed.prompts, PADDING)]
        captured.inputs.copy_(_stack(rows, captured.inputs.shape[1]))
        captured.wanted[:count].copy_(packed.wanted)
        if captured.read is not None and packed.read is not None:
            rows = [(packed.read, 0), (packed.read_positions, 0), (packed.read_prompts, PADDING)]
            captured.read.copy_(_stack(rows, captured.read.shape[1]))
        if captured.ends is not None:
            # Those of the prompts; the rest ends where the graph does.
            captured.ends.copy_(_filled(packed.ends[:-1], len(captured.ends), captured.inputs.shape[1]))
        captured.graph.replay()
        return captured.logits[:count].clone()  # the next replay overwrites what the graph wrote

    def _find(self, packed: PackedPrompts) -> _Captured | None:
        if packed.read is None:
            length = next((length for length in self._lengths if length >= len(packed.tokens)), -1)
            return self._captured.get((length, 0))
        length = next((length for length in self._parts if length >= len(packed.tokens)), -1)
        read = next((read for read in self._reads if read >= len(packed.read)), -1)
        return self._captured.get((length, read))


def _stack(rows: list[tuple[torch.Tensor, int]], length: int) -> torch.Tensor:
    """Rows of unequal length, each padded on the right with its value."""
    return torch.stack([_filled(row, length, value) for row, value in rows])


def _filled(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)), value=value)
