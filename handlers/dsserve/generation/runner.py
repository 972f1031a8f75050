"""What the engine, the warm-up and the self-check ask of a rank's model: `ModelRunner` (AutoTP), `KernelRunner`."""

from __future__ import annotations

from typing import Protocol

import torch

from dsserve.generation.model_runner import StepLogits
from dsserve.generation.plan import Plan


class Runner(Protocol):
    """One rank's model and its rows; all ranks execute the same plans in the same order.

    Attributes:
        slots: most live rows.
        kept: rows behind them for prompts that may come again.
        max_model_len: prompt + output of one row, in tokens.
        vocabulary: width of the logits.
        graph_pool: the memory of its captured graphs, which others may use again that never run at the same time.
    """

    slots: int
    kept: int
    max_model_len: int
    vocabulary: int
    graph_pool: object | None

    @property
    def live(self) -> int:
        """Number of live rows."""

    def execute(self, plan: Plan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """Rewind, keep, evict, decode, prefill, in this order. None where the plan computes nothing.

        Args:
            chosen: rank 0's, where the plan is `ahead`: its input tokens `[n]`, int64, on the device.
        """
