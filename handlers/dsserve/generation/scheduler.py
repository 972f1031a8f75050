"""Rank 0's book of requests: who waits, who runs in which row, what the next step does, when a text ends.

Pure bookkeeping on token ids and text: no model, no collective, no HTTP, so it is tested in milliseconds.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dsserve.errors import RequestError
from dsserve.generation.detokenizer import TextStream
from dsserve.generation.plan import Plan
from dsserve.generation.request import FinishReason, GenerationRequest, Usage
from dsserve.generation.sampler import Sampler

logger = logging.getLogger(__name__)

# New prompts enter a step up to this many tokens (at least one prompt), so that a burst of arrivals does not hold
# the first token of the first one, and the rows that run, until the last one is read.
PREFILL_TOKENS_A_STEP = 512


@dataclass(frozen=True)
class TokenEvent:
    """What one step gave one request: new text, and at the end the reason and the token counts.

    `failed`: the request could not go on, for a fault of ours; `error` is what the client is told, if
    that is more than "internal error".
    """

    request_id: str
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    failed: bool = False
    error: RequestError | None = None


class Sequence:
    """One request on its way: its sampler, its text so far, its last token."""

    def __init__(self, request: GenerationRequest, text: TextStream) -> None:
        self.request = request
        self.sampler = Sampler(request.sampling)
        self.last_token = -1
        self._text = text
        self._generated = 0

    def accept(self, token: int, eos_ids: frozenset[int]) -> TokenEvent:
        """Takes the next token and says what it means to the client."""
        self.last_token = token
        self._generated += 1
        if token in eos_ids:
            return self._finish(self._text.flush(), "stop")
        text = self._text.push(token)
        if self._text.stopped:
            return self._finish(text, "stop")
        if self._generated == self.request.max_new_tokens:
            return self._finish(text + self._text.flush(), "length")
        return TokenEvent(self.request.request_id, text)

    def _finish(self, text: str, reason: FinishReason) -> TokenEvent:
        usage = Usage(len(self.request.prompt_ids), self._generated)
        return TokenEvent(self.request.request_id, text, reason, usage)


class Scheduler:
    """Who runs. Rows are dense: `running[i]` is row i, and an evicted row is filled by the last one.

    Args:
        slots: most running sequences.
        make_text: a fresh incremental detokenizer for a request.
        eos_ids: the tokens that end a text.
    """

    def __init__(
        self, slots: int, make_text: Callable[[GenerationRequest], TextStream], eos_ids: frozenset[int]
    ) -> None:
        self._slots = slots
        self._make_text = make_text
        self._eos_ids = eos_ids
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._leaving: set[str] = set()

    @property
    def running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._waiting) or any(s.request.request_id not in self._leaving for s in self._running)

    def add(self, request: GenerationRequest) -> None:
        """Queues a request for the next free row."""
        self._waiting.append(Sequence(request, self._make_text(request)))

    def cancel(self, request_id: str) -> None:
        """Forgets a request; its row is freed in the next step. Unknown ids are fine: it may have ended already."""
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        if any(s.request.request_id == request_id for s in self._running):
            self._leaving.add(request_id)

    def plan(self, last: bool) -> Plan:
        """The next step, already entered in the book; `last` ends the handler's call."""
        evict = []
        for row in reversed(range(len(self._running))):
            if self._running[row].request.request_id in self._leaving:
                evict.append(row)
                final = self._running.pop()
                if row < len(self._running):
                    self._running[row] = final
        self._leaving.clear()
        tokens = tuple(sequence.last_token for sequence in self._running)
        admit: list[Sequence] = []
        budget = PREFILL_TOKENS_A_STEP
        while self._waiting and len(self._running) + len(admit) < self._slots:
            size = len(self._waiting[0].request.prompt_ids)
            if admit and size > budget:
                break
            budget -= size
            admit.append(self._waiting.popleft())
        self._running += admit
        return Plan(tuple(evict), tokens, tuple(s.request.prompt_ids for s in admit), last)

    def rows(self, plan: Plan) -> list[Sequence]:
        """The sequences whose logits the step gives: those it decodes, then those it admits."""
        return self._running[: len(plan.tokens) + len(plan.admit)]

    def accept(self, sequence: Sequence, token: int) -> TokenEvent:
        """Enters a sequence's next token; at its end the row is freed in the next step."""
        request_id = sequence.request.request_id
        try:
            event = sequence.accept(token, self._eos_ids)
        except Exception as error:  # must not keep rank 0 from sending the plan that the others wait for
            logger.error("[dsserve] %s: %s while decoding text", request_id, type(error).__name__)
            event = TokenEvent(request_id, "", failed=True)
        if event.finish_reason or event.failed:
            self._leaving.add(request_id)
        return event
