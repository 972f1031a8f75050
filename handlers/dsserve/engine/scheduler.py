"""Rank 0's book of sequences: who waits, who runs in which row, what the next step does.

A step has a limit of tokens. Longer prompts are read in parts, one a step, and running rows get their tokens between
(the field's chunked prefill). The limit is larger while no row runs, and while many more texts join than run. At most
one prompt is read in part at a time. It has the last row, which is not decoded.
Pure bookkeeping on token ids: no model, no collective, no HTTP, so it is tested in milliseconds.
"""

from __future__ import annotations

import math
from collections import deque

from dsserve.config.handler import PREFILL_TOKENS_A_STEP
from dsserve.core.step_plan import Admission, Plan, moves
from dsserve.engine.sequence import Sequence
from dsserve.kv.prefix_cache import PrefixCache, common_length

# A prompt that shares so many tokens with one of the same step waits for the next one and takes them over from it.
WORTH_A_STEP = 128


class Scheduler:
    """Who runs. Rows are dense: `running[i]` is row i, and an evicted row is filled by the last one.

    Args:
        slots: most running sequences.
        prefixes: the rows that a prompt may take its beginning from.
        prefill_tokens: most tokens of a step, of prompts and one of each row that it decodes; half of them are the
            prompts' in any case.
        idle_tokens: most tokens of prompts in a step that few or no rows wait for; default: `prefill_tokens`.
        waiting_served_ratio: so many times as many as run, and more than one, must wait and find a free row, for those
            that run to be few. A single prompt is read in parts beside the others, however few they are.
        by_span: prompts are read by their spans (`attention.prefill`): what they read of the cache needs no mask.
    """

    def __init__(
        self,
        slots: int,
        prefixes: PrefixCache,
        prefill_tokens: int = PREFILL_TOKENS_A_STEP,
        idle_tokens: int | None = None,
        waiting_served_ratio: float = math.inf,
        by_span: bool = False,
    ) -> None:
        self._slots = slots
        self._prefixes = prefixes
        self._prefill_tokens = prefill_tokens
        self._idle_tokens = max(prefill_tokens, idle_tokens or 0)
        self._waiting_served_ratio = waiting_served_ratio
        self._by_span = by_span
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._leaving: set[Sequence] = set()
        self._one_by_one = 0

    @property
    def running(self) -> int:
        """Sequences that hold a row and go on."""
        return len(self._running) - len(self._leaving)

    @property
    def waiting(self) -> int:
        """Sequences without a row."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._waiting) or self.running > 0

    @property
    def live(self) -> list[Sequence]:
        """Those that hold a row and go on."""
        return [sequence for sequence in self._running if sequence not in self._leaving]

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence for the next free row."""
        self._waiting.append(sequence)

    def is_live(self, sequence: Sequence) -> bool:
        """Whether a sequence that has a row goes on."""
        return sequence not in self._leaving

    def cancel(self, request_id: str) -> list[Sequence]:
        """Forgets a request's sequences and returns those that had not ended; their rows are freed in the next step.
        Unknown ids are fine: it may have ended already."""
        waiting = [s for s in self._waiting if s.request.request_id == request_id]
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        running = [s for s in self._running if s.request.request_id == request_id and s not in self._leaving]
        self._leaving |= set(running)
        return running + waiting

    def end(self, sequence: Sequence) -> None:
        """Frees a sequence's row in the next step."""
        self._leaving.add(sequence)

    def plan(self, last: bool) -> Plan:
        """The next step, already entered in the book; `last` ends the handler's call."""
        keep = self._keep_prefixes()
        evict = self._evict()
        decoded = self._running[:-1] if self._part is not None else self._running
        tokens = tuple(sequence.last_token for sequence in decoded)
        return Plan(keep, evict, tokens, self._admit(self._most(len(decoded))), last)

    def plan_ahead(self, last: bool) -> Plan | None:
        """The step after the one whose tokens are still unknown, with all its rows; None where it has to wait for them.

        A row whose text turns out to have ended is decoded once more: that is worth it while others surely go on, and
        nobody waits who could take its place. `last` as in `plan`.
        """
        if self._leaving or self._part is not None:
            return None
        ending = sum(sequence.generated + 1 >= sequence.request.max_new_tokens for sequence in self._running)
        has_room = ending > 0 or len(self._running) < self._slots
        if ending == len(self._running) or (self._waiting and has_room):
            return None
        if not all(sequence.is_chainable for sequence in self._running):
            return None
        return Plan(tokens=(0,) * len(self._running), last=last, ahead=True)

    @property
    def _part(self) -> Sequence | None:
        """The sequence whose prompt has been read in part."""
        return self._running[-1] if self._running and not self._running[-1].is_prefilled else None

    def _most(self, decoded: int) -> int:
        """Most tokens of prompts in a step that decodes so many rows."""
        joining = min(len(self._waiting), self._slots - len(self._running))  # others wait for a row, not for a step
        if not decoded or (joining > 1 and joining >= self._waiting_served_ratio * decoded):
            return self._idle_tokens
        # A captured pass has room for so many tokens, and the decoded rows' are among them.
        return max(self._prefill_tokens - decoded, self._prefill_tokens // 2, 1)

    def _keep_prefixes(self) -> tuple[tuple[int, int], ...]:
        pairs = []
        for row, sequence in enumerate(self._running):
            if sequence in self._leaving and (copy := self._prefixes.keep(sequence.computed)) is not None:
                pairs.append((row, copy))
        return tuple(pairs)

    def _evict(self) -> tuple[int, ...]:
        evict = []
        for row in reversed(range(len(self._running))):
            if self._running[row] in self._leaving:
                evict.append(row)
                for source, target in moves(row, len(self._running), self._part is not None):
                    self._running[target] = self._running[source]
                self._running.pop()
        self._leaving.clear()
        return tuple(evict)

    def _admit(self, most: int) -> tuple[Admission, ...]:
        """The prompts, or parts of them, that the next step reads: `most` tokens, if there are several.

        Without spans a step that reads the cache attends under a mask of its tokens by all that they see, which grows
        with the square of its prompts: together they stay within the limit of a busy step.
        """
        may_share = self._prefixes.enabled and self._waiting and len(self._running) < self._slots
        live = [(row, sequence.computed) for row, sequence in enumerate(self._running)] if may_share else []
        admitted: list[Admission] = []
        used, reads_cache = 0, False
        if (part := self._part) is not None:
            admitted.append(self._next_part(part, most, continues=True))
            used, reads_cache = len(admitted[0].tokens), not self._by_span
        while self._waiting and len(self._running) < self._slots and self._part is None:
            sequence = self._waiting[0]
            # The logits of a prompt that is taken over would be missing.
            hit = None if sequence.request.prompt_logprobs else self._prefixes.find(sequence.prompt, live)
            shared = 0 if hit is None else hit.length
            reads_cache = not self._by_span and (reads_cache or shared > 0)
            used += len(sequence.prompt) - shared
            if admitted and (
                used > (min(most, self._prefill_tokens) if reads_cache else most)
                or self._one_by_one
                or self._is_worth_waiting(sequence, len(admitted), shared)
            ):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.cached_tokens = sequence.prefilled = shared
            admitted.append(self._next_part(sequence, most, source=0 if hit is None else hit.row))
        self._one_by_one = max(0, self._one_by_one - len(admitted))
        return tuple(admitted)

    def _next_part(self, sequence: Sequence, most: int, source: int = 0, continues: bool = False) -> Admission:
        prompt, start = sequence.request.prompt_ids, sequence.prefilled
        sequence.prefilled = min(start + most, len(prompt))
        wants_all = sequence.request.prompt_logprobs
        tokens = prompt[start : sequence.prefilled]
        return Admission(tokens, source, start, wants_all, continues, sequence.is_prefilled)

    def take_back(self, plan: Plan) -> Sequence | None:
        """Undoes the admissions of the last plan, which did not fit into memory. Several prompts are tried again before
        all others: fewer at a time, and so from now on, if the step was larger than a busy one, else one by one. A
        single one is given up and returned."""
        count, size = len(plan.admit), sum(len(admission.tokens) for admission in plan.admit)
        sequences = self._running[-count:]
        for sequence, admission in zip(sequences, plan.admit, strict=True):
            sequence.prefilled = admission.shared
        new = sequences[1:] if plan.admit[0].continues else sequences
        self._running = self._running[: len(self._running) - len(new)]
        if count == 1:
            self._leaving |= set(sequences) - set(new)  # one that goes on has a row, whose part is evicted
            return sequences[0]
        for sequence in new:
            sequence.prefilled = 0
        self._waiting.extendleft(reversed(new))
        if size > self._prefill_tokens:
            self._idle_tokens = max(self._prefill_tokens, size // 2)
        else:
            self._one_by_one = count
        return None

    def _is_worth_waiting(self, sequence: Sequence, admitted: int, shared: int) -> bool:
        """Whether one of the prompts of this very step has much more in common with the sequence than `shared`."""
        if not self._prefixes.enabled or len(sequence.prompt) <= WORTH_A_STEP:
            return False
        others = (other.prompt for other in self._running[-admitted:])
        return any(common_length(sequence.prompt, other) >= shared + WORTH_A_STEP for other in others)

    def rows(self, plan: Plan) -> list[Sequence]:
        """The sequences whose logits the step gives: those it decodes, then those it admits; the last one's prompt may
        not be complete."""
        return self._running[: len(plan.tokens) + len(plan.admit)]
