"""What the engine, the warm-up and the self-check ask of a rank's model: `ModelRunner` (AutoTP), `KernelRunner`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dsserve.config.handler import YAML_FILE
from dsserve.core.errors import LoadError
from dsserve.core.step_plan import Segment, StepPlan, Wanted


@dataclass(frozen=True)
class StepLogits:
    """What one step gave, the same on all ranks.

    Attributes:
        next: `[n, V]`, of the last token of each segment that wants it.
        prompts: `[T, V]` for each segment whose logits were all wanted.
        fitted: False where the step did not fit into memory, and nothing was computed.
    """

    next: torch.Tensor
    prompts: tuple[torch.Tensor, ...] = ()
    fitted: bool = True


class Runner(Protocol):
    """One rank's model and its KV cache; all ranks execute the same plans in the same order.

    Attributes:
        rows: most texts of a step.
        max_model_len: prompt + output of one text, in tokens.
        vocabulary: width of the logits.
        graph_pool: the memory of its captured graphs, which others may use again that never run at the same time.
    """

    rows: int
    max_model_len: int
    vocabulary: int
    graph_pool: object | None

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """Computes a step. None where the plan computes nothing.

        Args:
            chosen: rank 0's, where the plan is `ahead`: what the step before chose, `[n]`, int64, on the device.
        """


def split_logits(logits: torch.Tensor, segments: tuple[Segment, ...]) -> StepLogits:
    """The logits `[W, V]` of the wanted tokens of all segments, in order, as of `StepInput.wanted`."""
    if not any(segment.wanted & Wanted.ALL for segment in segments):
        return StepLogits(logits)
    wanting = [segment for segment in segments if segment.wanted]
    parts = logits.split([len(segment.tokens) if segment.wanted & Wanted.ALL else 1 for segment in wanting])
    pairs = list(zip(wanting, parts, strict=True))
    last = [part[-1] for segment, part in pairs if segment.wanted & Wanted.NEXT]
    every = tuple(part for segment, part in pairs if segment.wanted & Wanted.ALL)
    return StepLogits(torch.stack(last) if last else logits[:0], every)


def execute_at_load(runner: Runner, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
    """Executes a plan before the first request, when it must find memory.

    Raises:
        LoadError: some rank has not the memory for it.
    """
    step = runner.execute(plan, chosen)
    if step is not None and not step.fitted:
        raise LoadError(
            f"{YAML_FILE}: beside weights and KV cache there is no memory to read {plan.total} tokens: lower "
            "handler.max_num_batched_tokens, kv_memory_fraction or max_model_len, or use more ranks"
        )
    return step
