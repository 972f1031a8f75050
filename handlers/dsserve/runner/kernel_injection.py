"""Runs a model with injected kernels on this rank: one batch of prompts, then steps until all its rows have ended.

The kernels hold one batch. A row that ended stays in it, as a dead one, and no row joins: `BatchScheduler` plans so.
Every rank holds one and executes the same plans in the same order. Does not choose tokens or requests.
"""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.step_plan import Segment, StepPlan, Wanted
from dsserve.injection.batch import KernelBatch
from dsserve.injection.workspace import WorkspaceSize
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.base import StepLogits
from dsserve.runner.trial import Trial


class KernelRunner:
    """A model with injected kernels, and which rows of the kernels' batch are alive.

    Args:
        module: DeepSpeed's module.
        size: of the kernels' workspace.
        max_model_len: prompt + output of one row, in tokens; at most the workspace's.
        memory: refuses prefills that do not fit; default: this rank's device.
    """

    graph_pool: object | None = None  # nothing is captured

    def __init__(
        self,
        module: Any,
        size: WorkspaceSize,
        max_model_len: int,
        rank: RankInfo,
        device: torch.device,
        memory: PrefillMemory | None = None,
    ) -> None:
        self.rows = size.rows
        self.max_model_len = max_model_len
        self.vocabulary = module.config.get_text_config().vocab_size
        self._memory = memory or PrefillMemory(device, rank, self.vocabulary)
        self._batch = KernelBatch(module, size.tokens, device)
        self._places: dict[int, int] = {}  # row -> its place in the kernels' batch
        self._no_logits = torch.empty(0, self.vocabulary, device=device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """See `Runner`: a batch of whole prompts, or the next token of its rows that go on.

        Raises:
            RuntimeError: a plan that the kernels cannot follow: prompts beside rows that go on, parts of prompts, or
                tokens that the host does not know.
        """
        if not plan.segments:
            return None
        if plan.is_ahead:
            raise RuntimeError("the kernels take their tokens from the host")
        starting = [segment.start == 0 for segment in plan.segments]
        if all(starting):
            return self._begin(plan.segments)
        if any(starting) or any(len(segment.tokens) > 1 for segment in plan.segments):
            raise RuntimeError("the kernels hold one batch: no text joins it, and none is read in parts")
        return StepLogits(self._decode(plan.segments))

    def trial(self) -> Trial:
        """Texts without a scheduler: at load."""
        return Trial(self, self.max_model_len)

    def _decode(self, segments: tuple[Segment, ...]) -> torch.Tensor:
        """Logits `[n, V]`."""
        step = [0] * self._batch.rows
        places = [self._places[segment.row] for segment in segments]
        for place, segment in zip(places, segments, strict=True):
            step[place] = segment.tokens[0]
        logits = self._batch.decode(step)
        return logits if places == list(range(self._batch.rows)) else logits[places]

    def _begin(self, segments: tuple[Segment, ...]) -> StepLogits:
        tokens = [segment.tokens for segment in segments]
        wants_all = any(segment.wanted & Wanted.ALL for segment in segments)
        padded = len(tokens) * max(map(len, tokens))
        counted = padded if wants_all else len(tokens)
        logits = self._memory.run(lambda: self._batch.prefill(tokens, wants_all), padded, counted)
        if logits is None:
            return StepLogits(self._no_logits, fitted=False)
        self._places = {segment.row: place for place, segment in enumerate(segments)}
        if not wants_all:
            return StepLogits(logits)
        pairs = zip(logits, segments, strict=True)
        own = [rows[-len(segment.tokens) :] for rows, segment in pairs if segment.wanted & Wanted.ALL]
        return StepLogits(logits[:, -1], tuple(own))
