"""What all ranks compute in the next step. `parallel.plan_channel` carries it from rank 0 to the others.

A plan (the field's scheduler output) is a short list of integers. Every step starts with one, so every call of the
handler holds a collective (ranks above 0 lose calls otherwise) and all ranks see the same texts. A prompt, a part of a
prompt (chunked prefill) and a decoded token are one thing: a segment. Decides nothing (`engine.scheduler`) and computes
nothing (`runner`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple


class Wanted:
    """The logits of a segment that somebody reads; plain numbers, of which a step compares some thousand."""

    NOTHING = 0
    NEXT = 1  # the last token's
    ALL = 2  # every token's, for their log probabilities


class Segment(NamedTuple):
    """Compute these tokens of one text, from position `start` on.

    Attributes:
        row: of the block tables, which is the text's while it runs.
        tokens: at least one.
        first_block: the place in the row's block table of the first of `blocks`; those before it stay as they are.
        blocks: pages that the row gets in this step.
        source: the one token is what the step before chose as its so many-th, on rank 0's device, and `tokens` holds a
            zero; -1 = the tokens are known.
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    first_block: int = 0
    blocks: tuple[int, ...] = ()
    wanted: int = Wanted.NEXT
    source: int = -1

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        segments: of texts that are decoded, of one token each, first; each of another row.
        last: the handler's call ends after this step.
    """

    segments: tuple[Segment, ...] = ()
    last: bool = False

    @property
    def total(self) -> int:
        """Tokens of the step."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def is_ahead(self) -> bool:
        """Whether some token is known to rank 0's device alone."""
        return any(segment.source >= 0 for segment in self.segments)

    def encode(self) -> list[int]:
        """Length-prefixed integers, each below 2**24, so that fp32 holds them exactly."""
        numbers = [int(self.last), len(self.segments)]
        for row, start, tokens, first_block, blocks, wanted, source in self.segments:
            numbers += (row, start, first_block, wanted, source + 1, len(tokens), len(blocks))
            numbers += tokens
            numbers += blocks
        return numbers

    @classmethod
    def decode(cls, numbers: list[int]) -> StepPlan:
        values = iter(numbers)
        last, count = next(values), next(values)
        segments = []
        for _ in range(count):
            row, start, first_block, wanted, source, length, pages = islice(values, 7)
            tokens, blocks = tuple(islice(values, length)), tuple(islice(values, pages))
            segments.append(Segment(row, start, tokens, first_block, blocks, wanted, source - 1))
        return cls(tuple(segments), bool(last))
