"""What rank 0's engine tells of its work: once a step, once a call, and at the end of each sequence.

Says nothing per token, so that watching costs the same for long and for short texts. Does not count (`metrics`) and
does not trace (`tracing`).
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dsserve.engine.sequence import Sequence

# How a sequence ended: by its text, by its length, given up (its client went away, or it took too long), by our fault.
Outcome = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Step:
    """One step of the engine; times in seconds of the monotonic clock.

    Attributes:
        started, ended: from the plan, or the tokens of the step before where that came later, to its tokens; the text
            of those that end nothing is made at the call's end.
        decoded: rows that had a token before and got the next one.
        admitted: the sequences whose prompts were read to their end, which gave their first token.
        read: tokens of prompts that were computed, of whole ones and of parts.
        generated: new tokens.
    """

    started: float
    ended: float
    decoded: int
    admitted: Rows[Sequence]
    read: int
    generated: int


@dataclass(frozen=True)
class Load:
    """What a call of the handler left.

    Attributes:
        running, waiting: sequences with and without a row.
        kv_usage: share of the pages that texts hold, 0 to 1.
        preemptions: texts that lost their pages to others so far.
    """

    running: int
    waiting: int
    kv_usage: float
    preemptions: int


class Observer:
    """Watches nothing; what watches overrides these. Called by rank 0's engine, in turn, never at the same time."""

    def stepped(self, step: Step) -> None:
        """A step computed something."""

    def called(self, load: Load) -> None:
        """A call of the handler ended."""

    def ended(self, sequence: Sequence, outcome: Outcome) -> None:
        """A sequence is over; its `timeline` is complete."""


class Observers(Observer):
    """Several that watch the same engine."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def stepped(self, step: Step) -> None:
        for observer in self._observers:
            observer.stepped(step)

    def called(self, load: Load) -> None:
        for observer in self._observers:
            observer.called(load)

    def ended(self, sequence: Sequence, outcome: Outcome) -> None:
        for observer in self._observers:
            observer.ended(sequence, outcome)
