"""The engine: sequences in, tokens out, led by rank 0.

Rank 0 admits, evicts and steps; the other ranks follow its plans. What joins when is the scheduler's, what a step
computes the runner's: continuous batching over KV slots (AutoTP), or one batch after the other (kernel injection). Does
not parse requests or render replies.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from dsserve.core.request import GenerationRequest, Origin, TokenEvent
from dsserve.core.step_plan import Plan
from dsserve.engine.detokenizer import TextStream
from dsserve.engine.in_flight import Flight
from dsserve.engine.observer import Observer
from dsserve.engine.output import Answers
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.sequence import Sequence, ending_ids
from dsserve.kv.prefix_cache import PrefixCache
from dsserve.parallel.plan_channel import PlanChannel
from dsserve.parallel.rank import RankInfo
from dsserve.runner.base import Runner
from dsserve.runner.prefill_batch import PREFILL_BUCKETS
from dsserve.sampling.grammar import GrammarCompiler
from dsserve.sampling.pending import HostChoice, Launch
from dsserve.sampling.sampler import SamplingState

logger = logging.getLogger(__name__)


# Prefills that a warm engine has the memory for, failing one after the other: something holds memory that should be
# free, and a new worker helps. A prompt that is simply too long, or wants all its logits, does not count, or one client
# could end the worker.
MOST_MEMORY_FAILURES = 3
# A step that is void costs a whole step, launching one ahead saves a tenth of one: where rules reach beyond what the
# device sees of a distribution, they do so again soon.
STEPS_AFTER_VOID = 16


class Engine:
    """One rank's engine. `admit`, `evict` and `run` are rank 0's; all others call `follow` once a handler call.

    Args:
        runner: the sharded model with its rows.
        make_text: a fresh incremental detokenizer for a request.
        eos_ids: the tokens that end a text.
        grammars: for requests with structured output.
        observer: hears of rank 0's steps and sequences.
        scheduler: default: continuous batching over the runner's slots.
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
        grammars: GrammarCompiler | None = None,
        observer: Observer | None = None,
        scheduler: Scheduler | None = None,
        launch: Launch = HostChoice,
        launch_ahead: bool = False,
    ) -> None:
        self._runner = runner
        self._channel = PlanChannel(rank.rank, rank.world_size)
        self._scheduler = scheduler or Scheduler(runner.slots, PrefixCache(runner.slots, runner.kept))
        self._launch_choice = launch
        self._may_launch_ahead = launch_ahead
        self._make_text = make_text
        self._eos_ids = eos_ids
        self._grammars = grammars
        self._observer = observer or Observer()
        self._answers = Answers(self._scheduler, self._observer)
        self._flights: deque[Flight] = deque()  # two at most; one between calls
        self._rewind = False  # the last step that the ranks executed is void
        self._patience = 0  # steps before one may be launched ahead again
        self._memory_failures = 0
        self._completes = False  # the present step reads a prompt to its end
        self._step_s = 0.0  # duration of the last step that ended no prompt

    @property
    def running(self) -> int:
        """Sequences that hold a KV slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a KV slot."""
        return self._scheduler.waiting

    def admit(self, request: GenerationRequest, origin: Origin | None = None) -> None:
        """Queues a sequence; it is prefilled in the next step that has a free slot."""
        grammar = None
        if request.sampling.grammar is not None and self._grammars is not None:
            grammar = self._grammars.start(request.sampling.grammar)
        state = SamplingState(request, ending_ids(request, self._eos_ids), grammar)
        self._scheduler.add(Sequence(request, self._make_text(request), state, self._eos_ids, origin))

    def evict(self, request_id: str) -> None:
        """Drops a request, wherever it is; its slots are free from the next step on."""
        for sequence in self._scheduler.cancel(request_id):
            self._answers.end(sequence, "abort")

    def run(self, max_steps: int, limit_s: float = math.inf) -> list[TokenEvent]:
        """Rank 0's part of one handler call: one step at least, then more as long as another one fits into both limits.

        A call ends early when a prompt was read to its end (its first token should leave), when a text ended (so should
        its last, and its slot is free), or when nothing is left to do. Text that ends nothing is made at its end. A
        step that was launched ahead may be left in flight: the next call begins with its tokens.
        """
        events: list[TokenEvent] = []
        begun = started = time.monotonic()
        for step in range(1, max_steps + 1):
            is_late = started - begun + 2 * self._step_s > limit_s  # after this step another one would not fit
            last = step == max_steps or is_late or not self._scheduler.has_work
            answered = self._step(last)
            events += answered
            ended = time.monotonic()
            if not self._completes:
                self._step_s = ended - started
            started = ended
            if last or not self._channel.is_open or any(event.is_last for event in answered):
                break
        self._channel.end_call()  # the others know a plan by its beginning only
        events += self._answers.speak()
        self._observer.called(self.running, self.waiting)
        return events

    def follow(self) -> None:
        """Any other rank's part of one handler call: executes plans up to the last one."""
        while True:
            plan = self._channel.receive()
            self._runner.execute(plan)
            if plan.last:
                return

    def _step(self, last: bool) -> list[TokenEvent]:
        """The tokens of one step; the one after it is in flight then, where that need not wait for them.

        Where the step in flight cannot be followed so, its tokens come first, and then those of the next one, unless
        there is a text's last one among them, which should leave.
        """
        events: list[TokenEvent] = []
        self._completes = False
        if self._flights and not self._launch_ahead(self._plan_ahead(last)):
            events = self._read()
            if any(event.is_last for event in events):
                return events
        if not self._flights:
            events += self._launch(last)
        return events + self._read()

    def _launch(self, last: bool) -> list[TokenEvent]:
        """Launches the next step while none is in flight, and the one after it where that need not wait; returns what
        failed. The call's last plan may be either; a prompt that is read to its end ends the call, too."""
        started = time.monotonic()
        plan = replace(self._scheduler.plan(last), rewind=self._rewind)
        self._rewind, self._patience = False, max(0, self._patience - 1)
        self._completes = any(admission.complete for admission in plan.admit)
        last = last or self._completes
        ahead = self._plan_ahead(last)
        plan = replace(plan, last=last and ahead is None)
        self._channel.send(plan)
        rows = self._scheduler.rows(plan)
        logits = self._runner.execute(plan)
        failed: list[TokenEvent] = []
        if logits is not None and not logits.admitted:
            failed, ahead = self._take_back(plan), None
            plan, rows = replace(plan, admit=()), rows[: len(plan.tokens)]
        elif plan.admit:
            self._memory_failures = 0
        if logits is not None and rows:
            states = [sequence.state for sequence in rows if sequence.is_prefilled]
            choice = self._launch_choice(logits.next[: len(states)], states)
            self._flights.append(Flight(plan, rows, logits, choice, started))
            self._launch_ahead(ahead)
        return failed

    def _plan_ahead(self, last: bool) -> Plan | None:
        return self._scheduler.plan_ahead(last) if self._may_launch_ahead and not self._patience else None

    def _launch_ahead(self, plan: Plan | None) -> bool:
        """Launches the step after the one in flight, whose tokens it takes from the device; False where there is no
        such plan."""
        if plan is None:
            return False
        started, before = time.monotonic(), self._flights[-1]
        self._channel.send(plan)
        logits = self._runner.execute(plan, before.choice.tokens)
        assert logits is not None, "a step of live rows has logits"
        choice = self._launch_choice(logits.next, [sequence.state for sequence in before.rows])
        self._flights.append(Flight(plan, before.rows, logits, choice, started))
        return True

    def _read(self) -> list[TokenEvent]:
        """The tokens of the older step in flight, if there is one. Where they are not those that the younger one was
        launched with, that one is void: it is forgotten here, and on all ranks with the next plan."""
        if not self._flights:
            return []
        flight = self._flights.popleft()
        events = self._answers.of(flight)
        if flight.choice.revised and self._flights:
            self._flights.pop().choice.take_back()
            self._rewind, self._patience = True, STEPS_AFTER_VOID
        return events

    def _take_back(self, plan: Plan) -> list[TokenEvent]:
        """After a prefill that did not fit into memory: its prompts wait again, or the only one fails."""
        sequence = self._scheduler.take_back(plan)
        if sequence is None:
            logger.warning("[dsserve] no memory for %d prompts in one step: fewer are tried", len(plan.admit))
            return []
        size = plan.admit[0].shared + len(plan.admit[0].tokens)
        logger.warning("[dsserve] %s: no memory for %d prompt tokens", sequence.name, size)
        if size <= PREFILL_BUCKETS[-1] and not plan.admit[0].all_logits:
            self._memory_failures += 1
        if self._memory_failures >= MOST_MEMORY_FAILURES:
            raise torch.OutOfMemoryError("passes that fitted at load fail one after the other")
        self._answers.end(sequence, "error")
        return [sequence.out_of_memory()]
