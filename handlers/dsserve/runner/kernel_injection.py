"""Runs a model with injected kernels on this rank: one batch of prompts, then steps until all its rows have ended.

The kernels hold one batch. A row that ended stays in it, as a dead one, and no row joins: `BatchScheduler` plans so.
Every rank holds one and executes the same plans in the same order. Does not choose tokens or requests.
"""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.step_plan import Admission, Plan
from dsserve.injection.batch import KernelBatch
from dsserve.injection.workspace import WorkspaceSize
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.base import StepLogits


class KernelRunner:
    """A model with injected kernels, and which rows of the kernels' batch are alive.

    Args:
        module: DeepSpeed's module.
        size: of the kernels' workspace.
        max_model_len: prompt + output of one row, in tokens; at most the workspace's.
        memory: refuses prefills that do not fit; default: this rank's device.
    """

    kept = 0
    graph_pool: object | None = None  # nothing is captured

    def __init__(
        self,
        module: Any,
        size: WorkspaceSize,
        max_model_len: int,
        device: torch.device,
        memory: PrefillMemory | None = None,
    ) -> None:
        self.slots = size.rows
        self.max_model_len = max_model_len
        self.vocabulary = module.config.get_text_config().vocab_size
        self._memory = memory or PrefillMemory(device, RankInfo.from_env(), self.vocabulary)
        self._batch = KernelBatch(module, size.tokens, device)
        self._rows: list[int] = []  # live row -> its row in the kernels' batch
        self._no_logits = torch.empty(0, self.vocabulary, device=device)

    @property
    def live(self) -> int:
        """Number of live rows."""
        return len(self._rows)

    @torch.inference_mode()
    def execute(self, plan: Plan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """Evict, then decode or prefill. None where the plan computes nothing.

        Raises:
            RuntimeError: a plan that the kernels cannot follow: prompts beside live rows, rows to keep, or tokens that
                the host does not know.
        """
        if plan.ahead or plan.rewind:
            raise RuntimeError("the kernels take their tokens from the host, and no step of theirs is taken back")
        for row in plan.evict:
            final = self._rows.pop()
            if row < self.live:
                self._rows[row] = final
        if plan.keep or (plan.admit and self.live):
            raise RuntimeError("the kernels hold one batch: no row is kept, and none joins it")
        if plan.admit:
            return self._begin(plan.admit)
        return StepLogits(self._decode(plan.tokens)) if plan.tokens else None

    def _decode(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Logits `[live, V]`."""
        step = [0] * self._batch.rows
        for row, token in zip(self._rows, tokens, strict=True):
            step[row] = token
        logits = self._batch.decode(step)
        return logits if self._rows == list(range(self._batch.rows)) else logits[self._rows]

    def _begin(self, prompts: tuple[Admission, ...]) -> StepLogits:
        tokens = [prompt.tokens for prompt in prompts]
        wants_all = any(prompt.all_logits for prompt in prompts)
        padded = len(tokens) * max(map(len, tokens))
        counted = padded if wants_all else len(tokens)
        logits = self._memory.run(lambda: self._batch.prefill(tokens, wants_all), padded, counted)
        if logits is None:
            return StepLogits(self._no_logits, admitted=False)
        self._rows = list(range(len(prompts)))
        if not wants_all:
            return StepLogits(logits)
        own = [rows[-len(prompt.tokens) :] for rows, prompt in zip(logits, prompts, strict=True) if prompt.all_logits]
        return StepLogits(logits[:, -1], tuple(own))
