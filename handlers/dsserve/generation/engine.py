"""The engine: sequences in, tokens out, led by rank 0.

Rank 0 admits, evicts and steps; the other ranks follow its plans. What joins when is the scheduler's, what a step
computes the runner's: continuous batching over KV slots (AutoTP), or one batch after the other (kernel injection). Does
not parse requests or render replies.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from dsserve.distributed import RankInfo
from dsserve.generation.detokenizer import TextStream
from dsserve.generation.grammar import GrammarCompiler
from dsserve.generation.model_runner import StepLogits
from dsserve.generation.observer import Observer, Outcome, Step
from dsserve.generation.packed_prompts import PREFILL_BUCKETS
from dsserve.generation.plan import Plan, PlanChannel
from dsserve.generation.prefix_cache import PrefixCache
from dsserve.generation.request import GenerationRequest, Origin, TokenEvent, TokenLogprob
from dsserve.generation.runner import Runner
from dsserve.generation.sampler import Choose, SamplingState, choose, report_logprobs
from dsserve.generation.scheduler import Scheduler
from dsserve.generation.sequence import Sequence, ending_ids

logger = logging.getLogger(__name__)


# Prefills that a warm engine has the memory for, failing one after the other: something holds memory that should be
# free, and a new worker helps. A prompt that is simply too long, or wants all its logits, does not count, or one client
# could end the worker.
MOST_MEMORY_FAILURES = 3


class Engine:
    """One rank's engine. `admit`, `evict` and `run` are rank 0's; all others call `follow` once a handler call.

    Args:
        runner: the sharded model with its rows.
        make_text: a fresh incremental detokenizer for a request.
        eos_ids: the tokens that end a text.
        grammars: for requests with structured output.
        observer: hears of rank 0's steps and sequences.
        scheduler: default: continuous batching over the runner's slots.
        choose: gives the next token of each row on rank 0; default: the sampler's.
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
        choose: Choose = choose,
    ) -> None:
        self._runner = runner
        self._channel = PlanChannel(rank.rank, rank.world_size)
        self._scheduler = scheduler or Scheduler(runner.slots, PrefixCache(runner.slots, runner.kept))
        self._choose = choose
        self._make_text = make_text
        self._eos_ids = eos_ids
        self._grammars = grammars
        self._observer = observer or Observer()
        self._ended: list[tuple[Sequence, TokenEvent]] = []  # in the present step
        self._memory_failures = 0
        self._step_s = 0.0  # of the last step

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
            self._end(sequence, "abort", time.monotonic())

    def run(self, max_steps: int, limit_s: float = math.inf) -> list[TokenEvent]:
        """Rank 0's part of one handler call: one step at least, then more as long as another one fits into both limits.

        A call ends early when a prompt was read to its end (its first token should leave), when a text ended (so should
        its last, and its slot is free), or when nothing is left to do. Text that ends nothing is made at its end.
        """
        events: list[TokenEvent] = []
        begun = started = time.monotonic()
        for step in range(1, max_steps + 1):
            is_late = started - begun + 2 * self._step_s > limit_s  # after this step another one would not fit
            plan = self._scheduler.plan(step == max_steps or is_late or not self._scheduler.has_work)
            if any(admission.complete for admission in plan.admit):
                plan = replace(plan, last=True)
            answered = self._step(plan)
            events += answered
            ended = time.monotonic()
            self._step_s, started = ended - started, ended
            if plan.last:
                break
            if any(event.is_last for event in answered):
                self._channel.send(Plan(last=True))  # the others know a plan by its beginning only
                break
        events += self._speak()
        self._observer.called(self.running, self.waiting)
        return events

    def follow(self) -> None:
        """Any other rank's part of one handler call: executes plans up to the last one."""
        while True:
            plan = self._channel.receive()
            self._runner.execute(plan)
            if plan.last:
                return

    def _step(self, plan: Plan) -> list[TokenEvent]:
        started = time.monotonic()
        self._channel.send(plan)
        logits = self._runner.execute(plan)
        if logits is None:
            return []
        if not logits.admitted:
            failed = self._take_back(plan)
            plan = replace(plan, admit=())
            return failed + self._answer(plan, logits, started) if plan.tokens else failed
        if plan.admit:
            self._memory_failures = 0
        return self._answer(plan, logits, started)

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
        self._end(sequence, "error", time.monotonic())
        return [sequence.out_of_memory()]

    def _answer(self, plan: Plan, logits: StepLogits, started: float) -> list[TokenEvent]:
        rows = self._scheduler.rows(plan)
        read = rows[len(plan.tokens) :]
        for sequence in read:
            sequence.timeline.admitted = sequence.timeline.admitted or started
        asking = [sequence for sequence in read if sequence.request.prompt_logprobs]
        prompts = dict(zip(asking, logits.prompts, strict=True))
        sequences = [sequence for sequence in rows if sequence.is_prefilled]  # all, or all but the last
        states = [sequence.state for sequence in sequences]
        tokens = self._choose(logits.next[: len(sequences)], states) if sequences else []
        chosen = time.monotonic()
        logprobs = _logprobs(logits, sequences, tokens)
        given = zip(sequences, tokens, logprobs, strict=True)
        events: list[TokenEvent] = []
        for sequence, token, logprob in given:
            told = self._enter(sequence, sequence.speak) if sequence.state.failed else []
            if not any(event.is_last for event in told):
                told += self._accept(sequence, token, logprob, prompts.get(sequence))
            events += told
        if len(rows) > len(sequences) and rows[-1] in prompts:
            part, logits_of_part = rows[-1], prompts[rows[-1]]  # there is an event only if that fails
            events += self._enter(part, lambda: part.report_prompt(logits_of_part))
        self._tell(plan, sequences, started, chosen)
        return events

    def _tell(self, plan: Plan, sequences: list[Sequence], started: float, chosen: float) -> None:
        """Tells of the step that gave these sequences a token each, those of `plan.tokens` not their first one."""
        now = time.monotonic()
        admitted = sequences[len(plan.tokens) :]
        for sequence in admitted:
            sequence.timeline.first_token = now
        # One that failed, or wanted no new token, got none.
        without = {sequence for sequence, event in self._ended if event.failed or not event.completion_tokens}
        read = sum(len(admission.tokens) for admission in plan.admit)
        generated = len(set(sequences) - without)
        self._observer.stepped(Step(started, now, len(plan.tokens), admitted, read, generated))
        self._tell_ended(chosen, now)

    def _tell_ended(self, chosen: float, now: float) -> None:
        for sequence, event in self._ended:
            sequence.timeline.last_token = chosen
            self._end(sequence, event.finish_reason or "error", now)
        self._ended.clear()

    def _end(self, sequence: Sequence, outcome: Outcome, at: float) -> None:
        sequence.timeline.ended = at
        self._observer.ended(sequence, outcome)

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

    def _speak(self) -> list[TokenEvent]:
        """The texts that waited for the end of the call: made once for all its tokens, while no row waits for them."""
        events = [event for sequence in self._scheduler.live for event in self._enter(sequence, sequence.speak)]
        now = time.monotonic()
        self._tell_ended(now, now)  # those whose text could not be made
        return events

    def _enter(self, sequence: Sequence, enter: Callable[[], TokenEvent | None]) -> list[TokenEvent]:
        """The event that `enter` gives, if any; after a last one the row is freed in the next step.

        An exception is the sequence's failure: it must not keep rank 0 from sending the plan that the others wait for.
        """
        try:
            event = enter()
        except torch.OutOfMemoryError:
            event = sequence.out_of_memory()
        except Exception as error:
            logger.error("[dsserve] %s: %s while decoding text", sequence.name, type(error).__name__)
            event = sequence.failure()
        if event is None:
            return []
        if event.is_last:
            self._scheduler.end(sequence)
            self._ended.append((sequence, event))
        return [event]


def _logprobs(logits: StepLogits, sequences: list[Sequence], tokens: list[int]) -> list[TokenLogprob | None]:
    """What each row's client wants to know of its token, None where nothing."""
    found: list[TokenLogprob | None] = [None] * len(sequences)
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
    if rows:
        counts = [sequences[row].request.sampling.logprobs or 0 for row in rows]
        reported = report_logprobs(logits.next[rows], [tokens[row] for row in rows], counts)
        for row, logprob in zip(rows, reported, strict=True):
            found[row] = logprob
    return found
