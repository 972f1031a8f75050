"""A plan as tensors: the tokens of all segments one behind the other, and where their keys and values lie.

Made on the host; a pass copies it to its device once. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsserve.core.step_plan import StepPlan, Wanted

# A pass is padded on the right to one of these lengths, then to multiples of half the last: each new shape costs 6 to
# 100 ms the first time on a CPU.
PREFILL_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Steps that decode so many texts or fewer without a graph are not padded, larger ones to multiples: the work of a CPU
# grows with the rows.
EXACT_ROWS, _ROW_STEP = 16, 4


@dataclass(frozen=True)
class StepInput:
    """The tokens of a step of n segments; T is their number.

    Attributes:
        tokens: `[T]`, int64.
        positions: `[T]`, int64, of each token in its own text.
        rows: `[n]`, int64, of the block tables.
        starts: `[n + 1]`, int64, the place of each segment's first token, and T (`cu_seqlens_q`).
        lengths: `[n]`, int64, keys that a segment's last token sees, itself among them (`seqused_k`).
        decoded: how many of the first segments have one token.
        fresh: nothing is read that earlier steps have computed.
        wanted: `[W]`, int64, places of the tokens whose logits are computed: each segment's, in order.
        sources: `[s, 2]`, int64, of tokens that the step before chose: place here, and there.
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    decoded: int
    fresh: bool
    wanted: np.ndarray
    sources: np.ndarray

    @classmethod
    def of(cls, plan: StepPlan) -> StepInput:
        """The input of a plan that computes something."""
        segments = plan.segments
        count = len(segments)
        numbers = np.array([(s.row, s.start, len(s.tokens), s.wanted, s.source) for s in segments], dtype=np.int64)
        rows, first, sizes, wanted, sources = np.ascontiguousarray(numbers.T)
        starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(sizes, out=starts[1:])
        total = int(starts[-1])
        tokens = np.fromiter((token for segment in segments for token in segment.tokens), np.int64, total)
        positions = np.arange(total) - np.repeat(starts[:-1] - first, sizes)
        longer = np.flatnonzero(sizes > 1)
        chained = np.flatnonzero(sources >= 0)
        return cls(
            tokens, positions, rows, starts, first + sizes,
            decoded=int(longer[0]) if len(longer) else count,
            fresh=not first.any(),
            wanted=_wanted(wanted, starts),
            sources=np.stack([starts[chained], sources[chained]], axis=1),
        )  # fmt: skip

    @property
    def total(self) -> int:
        """T."""
        return len(self.tokens)

    @property
    def sizes(self) -> np.ndarray:
        """`[n]`, tokens of each segment."""
        return np.diff(self.starts)

    @property
    def token_rows(self) -> np.ndarray:
        """`[T]`, the row of each token."""
        return np.repeat(self.rows, self.sizes)

    def padded(self, length: int, padding: int) -> np.ndarray:
        """Tokens, positions and rows, `[3, length]`, int64; behind the last token the row is `padding`."""
        numbers = np.zeros((3, length), dtype=np.int64)
        numbers[2] = padding
        numbers[:, : self.total] = self.tokens, self.positions, self.token_rows
        return numbers


def _wanted(wanted: np.ndarray, starts: np.ndarray) -> np.ndarray:
    if not (wanted & Wanted.ALL).any():
        return starts[1:][wanted > 0] - 1
    places = [
        np.arange(begin, end) if kind & Wanted.ALL else np.arange(end - 1, end) if kind else np.arange(0)
        for kind, begin, end in zip(wanted, starts[:-1], starts[1:], strict=True)
    ]
    return np.concatenate(places)


def padded_length(length: int) -> int:
    """The padded length of a pass of `length` tokens that reads prompts."""
    for bucket in PREFILL_BUCKETS:
        if length <= bucket:
            return bucket
    step = PREFILL_BUCKETS[-1] // 2
    return -(-length // step) * step


def decode_length(length: int) -> int:
    """The padded length of a pass of `length` tokens that decodes alone."""
    return length if length <= EXACT_ROWS else -(-length // _ROW_STEP) * _ROW_STEP
