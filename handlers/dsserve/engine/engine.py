"""The engine: sequences in, tokens out, led by rank 0.

Rank 0 admits, evicts and steps; the other ranks follow its plans. What joins when is the scheduler's, what a step
computes the runner's: continuous batching over pages (AutoTP), or one batch after the other (kernel injection). Does
not parse requests or render replies.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable

import torch

from dsserve.core.request import GenerationRequest, Origin, TokenEvent
from dsserve.engine.detokenizer import TextStream
from dsserve.engine.in_flight import Flight
from dsserve.engine.observer import Load, Observer
from dsserve.engine.output import Answers
from dsserve.engine.scheduler import Scheduler, Step
from dsserve.engine.sequence import Sequence, ending_ids
from dsserve.engine.token_budget import SURE_TOKENS
from dsserve.parallel.plan_channel import PlanChannel
from dsserve.parallel.rank import RankInfo
from dsserve.runner.base import Runner, StepLogits
from dsserve.sampling.grammar import GrammarCompiler
from dsserve.sampling.pending import HostChoice, Launch
from dsserve.sampling.sampler import SamplingState

logger = logging.getLogger(__name__)


# Prefills that a warm engine has the memory for, failing one after the other: something holds memory that should be
# free, and a new worker helps. A prompt that is simply too long, or wants all its logits, does not count, or one client
# could end the worker.
MOST_MEMORY_FAILURES = 3


class Engine:
    """One rank's engine. `admit`, `evict` and `run` are rank 0's; all others call `follow` once a handler call.

    Args:
        runner: the sharded model with its KV cache.
        make_text: a fresh incremental detokenizer for a request.
        eos_ids: the tokens that end a text.
        grammars: for requests with structured output.
        observer: hears of rank 0's steps and sequences.
        scheduler: what runs when.
        launch: chooses the next token of each row on rank 0; default: the sampler, on the host.
        launch_ahead: a step is launched before the tokens of the one before are read, where that changes no text.
            `launch` must leave tokens on the device.
    """

    def __init__(
        self,
        runner: Runner,
        rank: RankInfo,
        make_text: Callable[[GenerationRequest], TextStream],
        eos_ids: frozenset[int],
        scheduler: Scheduler,
        grammars: GrammarCompiler | None = None,
        observer: Observer | None = None,
        launch: Launch = HostChoice,
        launch_ahead: bool = False,
    ) -> None:
        self._runner = runner
        self._channel = PlanChannel(rank.rank, rank.world_size)
        self._scheduler = scheduler
        self._launch_choice = launch
        self._may_launch_ahead = launch_ahead
        self._make_text = make_text
        self._eos_ids = eos_ids
        self._grammars = grammars
        self._observer = observer or Observer()
        self._answers = Answers(self._scheduler, self._observer)
        self._flights: deque[Flight] = deque()  # two at most; one between calls
        self._memory_failures = 0
        self._step_s = 0.0  # duration of the last step that ended no prompt

    @property
    def running(self) -> int:
        """Sequences that hold a row."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        return self._scheduler.waiting

    def admit(self, request: GenerationRequest, origin: Origin | None = None) -> None:
        """Queues a sequence; it is read in the next step that has a row and pages for it."""
        grammar = None
        if request.sampling.grammar is not None and self._grammars is not None:
            grammar = self._grammars.start(request.sampling.grammar)
        state = SamplingState(request, ending_ids(request, self._eos_ids), grammar)
        self._scheduler.add(Sequence(request, self._make_text(request), state, self._eos_ids, origin))

    def evict(self, request_id: str) -> None:
        """Drops a request, wherever it is; its rows are free from the next step on."""
        for sequence in self._scheduler.cancel(request_id):
            self._answers.end(sequence, "abort")

    def run(self, max_steps: int, limit_s: float = math.inf) -> list[TokenEvent]:
        """Rank 0's part of one handler call: one step at least, then more as long as another one fits into both limits.

        A call ends early when a prompt was read to its end (its first token should leave), when a text ended (so should
        its last, and its row is free), or when nothing is left to do. Text that ends nothing is made at its end. A
        step that was launched ahead may be left in flight: the next call begins with its tokens.
        """
        events: list[TokenEvent] = []
        begun = started = time.monotonic()
        for step in range(1, max_steps + 1):
            is_late = started - begun + 2 * self._step_s > limit_s  # after this step another one would not fit
            last = step == max_steps or is_late or not self._scheduler.has_work
            answered, completes = self._step(last)
            events += answered
            ended = time.monotonic()
            if not completes:
                self._step_s = ended - started
            started = ended
            if last or completes or not self._channel.is_open or any(event.is_last for event in answered):
                break
        self._channel.end_call()  # the others know a plan by its beginning only
        events += self._answers.speak()
        self._observer.called(self._load)
        return events

    @property
    def _load(self) -> Load:
        scheduler = self._scheduler
        return Load(scheduler.running, scheduler.waiting, scheduler.kv.usage, scheduler.preemptions)

    def follow(self) -> None:
        """Any other rank's part of one handler call: executes plans up to the last one."""
        while True:
            plan = self._channel.receive()
            self._runner.execute(plan)
            if plan.last:
                return

    def _step(self, last: bool) -> tuple[list[TokenEvent], bool]:
        """The tokens of one step, and whether it read a prompt to its end. The one after it is in flight then, where
        that need not wait for them.

        Where the step in flight cannot be followed so, its tokens come first, and then those of the next one, unless
        there is a text's last one among them, which should leave.
        """
        events: list[TokenEvent] = []
        if self._flights and not self._launch_ahead(last):
            events, completes = self._read()
            if completes or any(event.is_last for event in events):
                return events, completes
        if not self._flights:
            events += self._launch(last)
        read, completes = self._read()
        return events + read, completes

    def _launch(self, last: bool) -> list[TokenEvent]:
        """Launches the next step while none is in flight, and the one after it where that need not wait; returns what
        failed."""
        started = time.monotonic()
        step = self._scheduler.plan(last and not self._may_launch_ahead)
        self._channel.send(step.plan)
        logits = self._runner.execute(step.plan)
        if logits is None:
            return []
        if not logits.fitted:
            return self._take_back(step)
        if step.completes:  # a prompt's last part; the first ones are no proof
            self._memory_failures = 0
            self._scheduler.found_memory()
        self._enter_flight(step, logits, started)
        self._launch_ahead(last)
        return []

    def _launch_ahead(self, last: bool) -> bool:
        """Launches the step after the one in flight, whose tokens it takes from the device; False where there is no
        such step."""
        if not self._may_launch_ahead:
            return False
        started, before = time.monotonic(), self._flights[-1]
        step = self._scheduler.plan_ahead(before.sources, last)
        if step is None:
            return False
        self._channel.send(step.plan)
        logits = self._runner.execute(step.plan, before.choice.tokens)
        assert logits is not None, "a step of texts has logits"
        if not logits.fitted:
            self._scheduler.undo(step)
            return False
        self._enter_flight(step, logits, started)
        return True

    def _enter_flight(self, step: Step, logits: StepLogits, started: float) -> None:
        rows = step.rows
        choice = self._launch_choice(logits.next, [text.state for text in rows])
        self._flights.append(Flight(step, rows, logits, choice, started))

    def _read(self) -> tuple[list[TokenEvent], bool]:
        """The tokens of the older step in flight, if there is one. Rows of the younger one that were launched with
        other tokens are void: they are computed again."""
        if not self._flights:
            return [], False
        flight = self._flights.popleft()
        completes = flight.step.completes
        events = self._answers.of(flight)
        if flight.choice.revised and self._flights:
            revised = {flight.rows[place] for place in flight.choice.revised if place not in flight.void}
            self._take_back_rows(revised, self._flights[0])
        return events, completes

    def _take_back_rows(self, texts: set[Sequence], flight: Flight) -> None:
        places = [place for place, text in enumerate(flight.rows) if text in texts]
        flight.void.update(places)
        flight.choice.take_back(places)
        for place in places:
            flight.rows[place].planned -= 1

    def _take_back(self, step: Step) -> list[TokenEvent]:
        """After a step that did not fit into memory: smaller ones are tried, and in the end one prompt fails."""
        self._scheduler.undo(step)
        logger.warning("[dsserve] no memory for a step of %d tokens: smaller ones are tried", step.plan.total)
        reading = step.reading
        if len(reading) > 1 or sum(count for _, count in reading) > SURE_TOKENS:
            self._scheduler.plan_less(step)
            return []
        sequence = self._scheduler.give_up(step)
        if sequence is None or not sequence.request.prompt_logprobs:
            self._memory_failures += 1
        if sequence is None or self._memory_failures >= MOST_MEMORY_FAILURES:
            raise torch.OutOfMemoryError("passes that fitted at load fail one after the other")
        logger.warning("[dsserve] %s: no memory for %d prompt tokens", sequence.name, sequence.length)
        self._answers.end(sequence, "error")
        return [sequence.out_of_memory()]
