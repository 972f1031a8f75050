"""What the engine, the warm-up and the self-check ask of a rank's model: `ModelRunner` (AutoTP), `KernelRunner`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dsserve.config.handler import YAML_FILE
from dsserve.core.errors import LoadError
from dsserve.core.step_plan import Plan


@dataclass(frozen=True)
class StepLogits:
    """What one step gave, the same on all ranks.

    Attributes:
        next: `[n, V]`, of the decoded rows, then of the last token of each admitted prompt, complete or not.
        prompts: `[T, V]` for each part of a prompt whose logits were all wanted, in the order of admission.
        admitted: False where the admitted prompts did not fit into memory: they hold no rows, `next` is of the decoded
            rows alone.
    """

    next: torch.Tensor
    prompts: tuple[torch.Tensor, ...] = ()
    admitted: bool = True


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
        """Rewind, keep, evict, in this order, then decode and prefill, in either order or in one pass. None where the
        plan computes nothing.

        Args:
            chosen: rank 0's, where the plan is `ahead`: its input tokens `[n]`, int64, on the device.
        """


def prefill_at_load(runner: Runner, plan: Plan) -> StepLogits | None:
    """Executes a plan before the first request, when its prompts must find memory: rows are counted on afterwards.

    Raises:
        LoadError: some rank has not the memory for them.
    """
    step = runner.execute(plan)
    if step is not None and not step.admitted:
        tokens = sum(len(admission.tokens) for admission in plan.admit)
        raise LoadError(
            f"{YAML_FILE}: beside weights and KV cache there is no memory to read {tokens} tokens: lower "
            "handler.max_batch_prefill_tokens, kv_memory_fraction or max_model_len, or use more ranks"
        )
    return step
