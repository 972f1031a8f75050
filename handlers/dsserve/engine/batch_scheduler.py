"""Rank 0's book where rows cannot join a batch that runs: kernel injection, whose kernels count tokens once for all.

What waits when a batch has ended forms the next one; TorchServe's `maxBatchDelay` is how long an idle worker waits for
a batch to gather. Rows that end leave the book at once; what becomes of them in the batch is the runner's affair.
"""

from __future__ import annotations

from dsserve.core.step_plan import Admission, Plan
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.sequence import Sequence
from dsserve.kv.prefix_cache import PrefixCache


class BatchScheduler(Scheduler):
    """Batches that run to completion, in the order of arrival.

    Args:
        slots: most sequences of a batch.
        max_tokens: the longest prompt and the longest output of a batch together: prompts are padded to one length.
    """

    def __init__(self, slots: int, max_tokens: int) -> None:
        super().__init__(slots, PrefixCache(slots, 0))
        self._max_tokens = max_tokens

    def plan_ahead(self, last: bool) -> Plan | None:
        """None: the kernels take their tokens from the host."""
        return None

    def _admit(self, most: int) -> tuple[Admission, ...]:
        """The next batch: the first sequence that waits, and those behind it that fit beside it.

        One that does not fit keeps its place, and is the first of a batch when its turn comes.
        """
        if self._running:
            return ()
        prompt = output = 0
        for sequence in list(self._waiting):
            if len(self._running) == self._slots or (self._running and self._one_by_one):
                break
            longer = max(prompt, len(sequence.request.prompt_ids)), max(output, sequence.request.max_new_tokens)
            if self._running and sum(longer) > self._max_tokens:
                continue
            prompt, output = longer
            self._waiting.remove(sequence)
            self._running.append(sequence)
            sequence.prefilled = len(sequence.request.prompt_ids)  # prompts are never read in parts
        self._one_by_one = max(0, self._one_by_one - len(self._running))
        return tuple(_admission(sequence) for sequence in self._running)


def _admission(sequence: Sequence) -> Admission:
    return Admission(sequence.request.prompt_ids, all_logits=sequence.request.prompt_logprobs)
