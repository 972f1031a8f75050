"""Prefill as CUDA graphs: a pass of up to some thousand tokens is bound by launches, not by arithmetic.

A graph is captured for every padded length, in one of two modes:

- Attention finds the prompts' keys by their spans (`attention.prefill`). The spans are an input of the graph.
- Attention reads a mask. The graph makes the mask from positions and prompt numbers. That pays for short passes alone,
  and there are graphs for some lengths of the keys that a pass reads from the cache.

Covers passes that want the logits of each prompt's last token; `autotp` runs all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsserve.attention.prefill import PromptSpans
from dsserve.kernels.cuda_graph import buckets, capture
from dsserve.runner.prefill_batch import PADDING, PREFILL_BUCKETS, PackedPrompts, prefill_bucket

# Under a mask. Measured on an H200, 6.7 billion parameters: 128 tokens take 5.4 ms in a graph and 18 without, 500 take
# 25 and 19, since attention under a mask does not run in torch's flash kernel.
_LONGEST = 256
# With spans. The same shape's eager pass of 1024 tokens takes 57 ms on an H100 with TP=2, of which most is the host's.
_MORE_LENGTHS = (768, 1024, 1536, 2048, 3072, 4096)
MOST_TOKENS = _MORE_LENGTHS[-1]
# Passes that read the cache under a mask are padded to one of these: each is captured for all lengths of what is read.
_PARTS = (64, 128, 256)
# Those lengths double from the first to the last; passes that read more run eagerly: a graph holds its mask and a copy
# of a layer's keys and values, which would be gigabytes for the longest contexts.
_SHORTEST_READ, _LONGEST_READ = 512, 4096

# With spans a graph is captured for this many prompts too, and for many that are short: the flash kernel has a block
# for each prompt and each of its possible tokens, whether there are any or not.
_FEW, _SHARE_OF_SHORT, _WORTH_A_GRAPH = 8, 8, 1024

# (tokens, positions, cells and prompt numbers [4, T]; wanted [W]; cells, positions and prompt numbers [3, S] of what is
# read of the cache under a mask, or None; the prompts' spans, or None) -> logits [W, V], all on the device
Forward = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", "PromptSpans | None"], torch.Tensor]


@dataclass(frozen=True, order=True)
class Shape:
    """What a graph has room for.

    Attributes:
        tokens: T, of the pass.
        prompts: their number.
        longest: of their parts in the pass, in tokens; with spans.
        read: S, what is read of the cache under a mask; 0 = nothing.
    """

    tokens: int
    prompts: int
    longest: int
    read: int = 0

    def holds(self, other: Shape) -> bool:
        """Whether a pass of the other shape fits."""
        fits = other.tokens <= self.tokens and other.prompts <= self.prompts and other.longest <= self.longest
        return fits and other.read <= self.read and (self.read == 0) == (other.read == 0)


@dataclass(frozen=True)
class CapturedPass:
    """One graph with the tensors it reads and writes; `autotp` fills and runs it."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # [4, T], int64
    wanted: torch.Tensor  # [W], int64
    read: torch.Tensor | None  # [3, S], int64
    spans: PromptSpans | None
    logits: torch.Tensor  # [W, V]

    def run(self, packed: PackedPrompts) -> torch.Tensor:
        """Logits `[n, V]` of the last tokens of n prompts."""
        count, length = len(packed.wanted), self.inputs.shape[1]
        rows = [(packed.tokens, 0), (packed.positions, 0), (packed.cells, -1), (packed.prompts, PADDING)]
        self.inputs.copy_(_stack(rows, length))
        self.wanted[:count].copy_(packed.wanted)
        if self.spans is not None and self.spans.table is not None:
            self.spans.table.copy_(packed.spans(self.spans.table.shape[1], length))
        elif self.read is not None and packed.read is not None:
            cells, positions, prompts = packed.read
            rows = [(cells, 0), (positions, 0), (prompts, PADDING)]
            self.read.copy_(_stack(rows, self.read.shape[1]))
        self.graph.replay()
        return self.logits[:count].clone()  # the next replay overwrites what the graph wrote


class PrefillGraphs:
    """The captured passes of one model; all ranks capture and replay them in the same order.

    Args:
        forward: one pass on device tensors, without a word to the host; writes nothing to negative cells.
        most: most prompts of a pass.
        longest: longest prompt, in tokens.
        by_prompt: attention takes the prompts' spans.
        tokens: of the prompts of a pass at most; longer passes are not captured anyway.
    """

    def __init__(
        self,
        forward: Forward,
        most: int,
        longest: int,
        device: torch.device,
        by_prompt: bool = False,
        tokens: int = MOST_TOKENS,
    ) -> None:
        self._forward = forward
        self._device = device
        self.by_prompt = by_prompt
        self._longest = longest
        self.shapes = sorted(_shapes(most, longest, by_prompt, tokens))
        self._captured: dict[Shape, CapturedPass] = {}

    @torch.inference_mode()
    def capture(self, pool: object) -> None:
        """Captures every shape, the largest first; `pool` as `DecodeGraphs.capture` takes it.

        Raises:
            LoadError: see `decode_graphs.capture`.
        """
        for shape in reversed(self.shapes):
            self._captured[shape] = self._capture_one(shape, pool)

    def _capture_one(self, shape: Shape, pool: object) -> CapturedPass:
        inputs = torch.zeros(4, shape.tokens, dtype=torch.int64, device=self._device)
        inputs[2] = -1
        wanted = torch.zeros(shape.prompts, dtype=torch.int64, device=self._device)
        read = torch.zeros(3, shape.read, dtype=torch.int64, device=self._device) if shape.read else None
        spans = None
        if self.by_prompt:  # the prompts' and the padding's
            table = torch.zeros(3, shape.prompts + 2, dtype=torch.int32, device=self._device)
            table[0, 1:] = shape.tokens
            spans = PromptSpans([], table, shape.longest, self._longest + 1)
        graph, logits = capture(lambda: self._forward(inputs, wanted, read, spans), pool, self._device)
        return CapturedPass(graph, inputs, wanted, read, spans, logits)

    def find(self, packed: PackedPrompts) -> CapturedPass | None:
        """The smallest graph that has room for a pass; None for one that must run eagerly."""
        if packed.wants_all:
            return None
        read = 0 if self.by_prompt or packed.read is None else packed.read.shape[1]
        needed = Shape(packed.total, len(packed.wanted), packed.longest, read)
        return next((self._captured[shape] for shape in self.shapes if shape.holds(needed)), None)


def most_captured(most: int, longest: int, by_prompt: bool, tokens: int) -> int:
    """Tokens of the longest pass that is captured; arguments as `PrefillGraphs`'. Decoded rows may join the prompts."""
    return min(prefill_bucket(min(most * longest, tokens + most)), MOST_TOKENS if by_prompt else _LONGEST)


def captured_rows(most: int, longest: int, by_prompt: bool, tokens: int) -> int:
    """Rows of logits that all graphs together hold; arguments as `PrefillGraphs`'."""
    return sum(shape.prompts for shape in _shapes(most, longest, by_prompt, tokens))


def _shapes(most: int, longest: int, by_prompt: bool, tokens: int) -> set[Shape]:
    largest = most_captured(most, longest, by_prompt, tokens)
    return _span_shapes(most, largest) if by_prompt else _mask_shapes(most, longest, largest)


def _span_shapes(most: int, largest: int) -> set[Shape]:
    """Of passes in which attention takes the prompts' spans: few prompts, many, and of long passes many short ones."""
    shapes = set()
    for tokens in (length for length in (*PREFILL_BUCKETS, *_MORE_LENGTHS) if length <= largest):
        shapes |= {Shape(tokens, min(count, tokens), tokens) for count in (min(_FEW, most), most)}
        if tokens >= _WORTH_A_GRAPH and most > _FEW:
            shapes.add(Shape(tokens, most, tokens // _SHARE_OF_SHORT))
    return shapes


def _mask_shapes(most: int, longest: int, largest: int) -> set[Shape]:
    """Of passes under a mask."""
    lengths = [length for length in PREFILL_BUCKETS if length <= largest]
    most_read = min(prefill_bucket(longest + 1), _LONGEST_READ)
    reads = buckets(_SHORTEST_READ, max(_SHORTEST_READ, most_read))
    parts = [length for length in _PARTS if length in lengths]
    pairs = [(length, 0) for length in lengths] + list(itertools.product(parts, reads))
    return {Shape(length, min(most, length), length, read) for length, read in pairs}


def _stack(rows: list[tuple[torch.Tensor, int]], length: int) -> torch.Tensor:
    """Rows of unequal length, each padded on the right with its value."""
    return torch.stack([_filled(row, length, value) for row, value in rows])


def _filled(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """A row with more padding, or less."""
    return torch.nn.functional.pad(row, (0, length - len(row)), value=value)
