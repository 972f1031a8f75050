"""A step in flight (async scheduling): launched on all ranks, its tokens not read by the host yet."""

from __future__ import annotations

from dataclasses import dataclass

from dsserve.core.step_plan import Plan
from dsserve.engine.sequence import Sequence
from dsserve.runner.base import StepLogits
from dsserve.sampling.pending import Choice


@dataclass(frozen=True)
class Flight:
    """One step of rank 0's.

    Attributes:
        plan: what it computes; of its admissions only those that fitted into memory.
        rows: the sequences of its rows when it was launched: those it decodes, then those it admits. Some may have
            ended since.
        choice: of the rows whose prompts are complete: all, or all but the last.
        started: the plan was made; s of the monotonic clock.
    """

    plan: Plan
    rows: list[Sequence]
    logits: StepLogits
    choice: Choice
    started: float
