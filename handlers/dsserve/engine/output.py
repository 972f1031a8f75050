"""What a step's tokens mean to its sequences: their texts go on or end, and the observer hears of it. Rank 0's alone.

Does not plan, launch or choose (`engine`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from dsserve.core.request import TokenEvent, TokenLogprob
from dsserve.core.step_plan import Wanted
from dsserve.engine.in_flight import Flight
from dsserve.engine.observer import Observer, Outcome, Step
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.sequence import Sequence
from dsserve.sampling.faults import Fault, attempt, describe
from dsserve.sampling.sampler import note, report_logprobs

logger = logging.getLogger(__name__)


class Answers:
    """Enters tokens into the sequences of one engine and gives the events for their clients.

    Args:
        scheduler: hears which rows end.
        observer: hears of steps and of sequences that end.
    """

    def __init__(self, scheduler: Scheduler, observer: Observer) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._ended: list[tuple[Sequence, TokenEvent]] = []  # in the present step
        self._step_ended = 0.0

    def of(self, flight: Flight) -> list[TokenEvent]:
        """Waits for a step's tokens and enters them. Rows that ended since its launch, or are void, get nothing."""
        pairs = list(zip(flight.step.texts, flight.step.plan.segments, strict=True))
        for text, _ in pairs:
            text.timeline.admitted = text.timeline.admitted or flight.started
        asking = [text for text, segment in pairs if segment.wanted & Wanted.ALL]
        prompts = dict(zip(asking, flight.logits.prompts, strict=True))
        going = [
            (place, text)
            for place, text in enumerate(flight.rows)
            if place not in flight.void and self._scheduler.is_live(text)
        ]
        read = sum(count for _, count in flight.step.reading)
        if not going and not read:
            return []
        first = [text for _, text in going if not text.generated]
        tokens = flight.choice.read() if going else []
        chosen = time.monotonic()
        logprobs = _logprobs(flight, going, tokens)
        events: list[TokenEvent] = []
        for place, text in going:
            events += self._take(text, tokens[place], logprobs.get(place), prompts.pop(text, None))
        for text, logits in prompts.items():  # of parts; there is an event only if that fails
            if self._scheduler.is_live(text):
                events += self._enter(text, partial(text.report_prompt, logits))
        self._tell(flight, going, first, read, chosen)
        return events

    def speak(self) -> list[TokenEvent]:
        """The texts that waited for the end of the call: made once for all its tokens, while no row waits for them."""
        events = [event for sequence in self._scheduler.live for event in self._enter(sequence, sequence.speak)]
        now = time.monotonic()
        self._tell_ended(now, now)  # those whose text could not be made
        return events

    def end(self, sequence: Sequence, outcome: Outcome) -> None:
        """Tells of a sequence that ends without a token."""
        self._end(sequence, outcome, time.monotonic())

    def _tell(
        self, flight: Flight, going: list[tuple[int, Sequence]], first: list[Sequence], read: int, chosen: float
    ) -> None:
        """Tells of the step that gave these rows a token each, some of them their first."""
        now = time.monotonic()
        for sequence in first:
            sequence.timeline.first_token = now
        # One that failed, or wanted no new token, got none.
        without = {sequence for sequence, event in self._ended if event.failed or not event.completion_tokens}
        generated = len({sequence for _, sequence in going} - without)
        started = max(flight.started, self._step_ended)  # one that was launched ahead waited for the one before
        self._observer.stepped(Step(started, now, len(going) - len(first), first, read, generated))
        self._step_ended = now
        self._tell_ended(chosen, now)

    def _tell_ended(self, chosen: float, now: float) -> None:
        for sequence, event in self._ended:
            sequence.timeline.last_token = chosen
            self._end(sequence, event.finish_reason or "error", now)
        self._ended.clear()

    def _end(self, sequence: Sequence, outcome: Outcome, at: float) -> None:
        sequence.timeline.ended = at
        self._observer.ended(sequence, outcome)

    def _take(
        self, sequence: Sequence, token: int, logprob: TokenLogprob | None, prompt: torch.Tensor | None
    ) -> list[TokenEvent]:
        """What a row's token means, or that there is none: then the text before it is told, and the failure."""
        fault = sequence.state.fault
        if fault is None:
            return self._accept(sequence, token, logprob, prompt)
        told = self._enter(sequence, sequence.speak)
        return told if any(event.is_last for event in told) else [*told, self._fail(sequence, fault)]

    def _accept(
        self, sequence: Sequence, token: int, logprob: TokenLogprob | None, prompt: torch.Tensor | None
    ) -> list[TokenEvent]:
        """Enters a sequence's next token, and its prompt's logits where they were wanted. Nothing where the text is
        told at the end of the call."""

        def enter() -> TokenEvent | None:
            if prompt is not None:
                sequence.report_prompt(prompt)
            if sequence.request.max_new_tokens == 0:
                return sequence.finish_empty()
            return sequence.accept(token, logprob, may_wait=prompt is None)

        return self._enter(sequence, enter)

    def _enter(self, sequence: Sequence, enter: Callable[[], TokenEvent | None]) -> list[TokenEvent]:
        """The event that `enter` gives, if any; after a last one the row is freed in the next step.

        An exception is the sequence's failure: it must not keep rank 0 from sending the plan that the others wait for.
        """
        try:
            event = enter()
        except torch.OutOfMemoryError as error:
            return [self._fail(sequence, Fault(describe(error), sequence.out_of_memory().error))]
        except BaseException as error:
            return [self._fail(sequence, Fault.of(error))]
        if event is None:
            return []
        if event.is_last:
            self._leave(sequence, event)
        return [event]

    def _fail(self, sequence: Sequence, fault: Fault) -> TokenEvent:
        logger.error("[dsserve] %s: the text cannot go on: %s", sequence.name, fault.cause)
        event = sequence.failure(fault.error)
        self._leave(sequence, event)
        return event

    def _leave(self, sequence: Sequence, event: TokenEvent) -> None:
        self._scheduler.end(sequence)
        self._ended.append((sequence, event))


def _logprobs(flight: Flight, going: list[tuple[int, Sequence]], tokens: list[int]) -> dict[int, TokenLogprob]:
    """What clients want to know of their rows' tokens, by row. A row for which that raises has a fault."""
    asking = [
        (row, sequence.state, count)
        for row, sequence in going
        if (count := sequence.request.sampling.logprobs) is not None and sequence.state.fault is None
    ]
    found: dict[int, TokenLogprob] = {}

    def report(part: range) -> None:
        rows, _, counts = zip(*asking[part.start : part.stop], strict=True)
        logits = flight.logits.next[list(rows)]
        found.update(zip(rows, report_logprobs(logits, [tokens[row] for row in rows], list(counts)), strict=True))

    note(attempt(range(len(asking)), report), [state for _, state, _ in asking])
    return found
