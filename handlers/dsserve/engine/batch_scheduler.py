"""Rank 0's book where rows cannot join a batch that runs: kernel injection, whose kernels count tokens once for all.

What waits when a batch has ended forms the next one; TorchServe's `maxBatchDelay` is how long an idle worker waits for
a batch to gather. Rows that end leave the book at once; what becomes of them in the batch is the runner's affair.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsserve.core.step_plan import Segment, StepPlan, Wanted
from dsserve.engine.scheduler import Scheduler, Step
from dsserve.engine.sequence import Sequence
from dsserve.engine.token_budget import TokenBudget
from dsserve.kv.manager import KVManager


class BatchScheduler(Scheduler):
    """Batches that run to completion, in the order of arrival.

    Args:
        rows: most sequences of a batch.
        max_tokens: the longest prompt and the longest output of a batch together: prompts are padded to one length.
    """

    def __init__(self, rows: int, max_tokens: int) -> None:
        # The kernels keep a row of the longest text for each: one page.
        super().__init__(rows, KVManager(rows, max_tokens, reuse=False), TokenBudget(rows * max_tokens, max_tokens))
        self._max_tokens = max_tokens
        self._most = self._rows = rows

    def plan_ahead(self, sources: Mapping[Sequence, int], last: bool = False) -> Step | None:
        """None: the kernels take their tokens from the host."""
        return None

    def _build(self, sources: Mapping[Sequence, int], may_preempt: bool, last: bool) -> Step:
        chosen = self._running or self._next_batch()
        segments = tuple(self._whole(text) for text in chosen)
        return Step(StepPlan(segments, last), tuple(chosen))

    def _next_batch(self) -> list[Sequence]:
        """The first sequence that waits, and those behind it that fit beside it.

        One that does not fit keeps its place, and is the first of a batch when its turn comes.
        """
        prompt = output = 0
        for text in self._waiting:
            if not self._free_rows or len(self._running) == self._most:
                break
            longer = max(prompt, len(text.request.prompt_ids)), max(output, text.request.max_new_tokens)
            if self._running and sum(longer) > self._max_tokens:
                continue
            prompt, output = longer
            self._waiting.remove(text)
            self.kv.grow(text.pages, 1)
            text.row = self._free_rows.pop()
            self._running.append(text)
        self._admitted = list(self._running)
        return self._running

    def _whole(self, text: Sequence) -> Segment:
        """A prompt, or the newest token."""
        start, text.planned = text.planned, text.length
        wanted = Wanted.NEXT | (Wanted.ALL if text.wants_all else Wanted.NOTHING)
        assert text.row is not None
        return Segment(text.row, start, tuple(text.ids(start, text.length)), wanted=wanted)

    def plan_less(self, step: Step) -> None:
        """A batch had not the memory: the next one is half as large."""
        self._most = max(1, len(step.texts) // 2)

    def found_memory(self) -> None:
        """The batches after one that fitted may be larger again."""
        self._most = min(self._rows, 2 * self._most)
