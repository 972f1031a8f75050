"""A step in flight (async scheduling): launched on all ranks, its tokens not read by the host yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsserve.engine.scheduler import Step
from dsserve.engine.sequence import Sequence
from dsserve.runner.base import StepLogits
from dsserve.sampling.pending import Choice


@dataclass(frozen=True)
class Flight:
    """One step of rank 0's.

    Attributes:
        step: what it computes.
        rows: the texts that get a token. Some may have ended since it was launched.
        choice: of these rows.
        started: the plan was made; s of the monotonic clock.
        void: places of rows that were launched with another token than the host has chosen.
    """

    step: Step
    rows: list[Sequence]
    logits: StepLogits
    choice: Choice
    started: float
    void: set[int] = field(default_factory=set)

    @property
    def sources(self) -> dict[Sequence, int]:
        """The rows that go on, and their places in the choice."""
        return {text: place for place, text in enumerate(self.rows) if place not in self.void}
