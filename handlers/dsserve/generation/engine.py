"""The AutoTP engine: continuous batching over KV slots, led by rank 0.

Rank 0 admits, evicts and steps; the other ranks follow its plans. Does not parse requests or render replies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dsserve.distributed import RankInfo
from dsserve.generation.detokenizer import TextStream
from dsserve.generation.grammar import GrammarCompiler
from dsserve.generation.model_runner import ModelRunner, StepLogits
from dsserve.generation.plan import Plan, PlanChannel
from dsserve.generation.prefix_cache import PrefixCache
from dsserve.generation.request import GenerationRequest, TokenEvent, TokenLogprob
from dsserve.generation.sampler import SamplingState, choose, report_logprobs
from dsserve.generation.scheduler import Scheduler
from dsserve.generation.sequence import Sequence, ending_ids

logger = logging.getLogger(__name__)


class Engine:
    """One rank's engine. `admit`, `evict` and `run` are rank 0's; all others call `follow` once a handler call.

    Args:
        runner: the sharded model with its KV slots.
        make_text: a fresh incremental detokenizer for a request.
        eos_ids: the tokens that end a text.
        grammars: for requests with structured output.
    """

    def __init__(
        self,
        runner: ModelRunner,
        rank: RankInfo,
        make_text: Callable[[GenerationRequest], TextStream],
        eos_ids: frozenset[int],
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._runner = runner
        self._channel = PlanChannel(rank.rank, rank.world_size)
        self._scheduler = Scheduler(runner.slots, PrefixCache(runner.slots, runner.kept))
        self._make_text = make_text
        self._eos_ids = eos_ids
        self._grammars = grammars

    @property
    def running(self) -> int:
        """Sequences that hold a KV slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a KV slot."""
        return self._scheduler.waiting

    def admit(self, request: GenerationRequest) -> None:
        """Queues a sequence; it is prefilled in the next step that has a free slot."""
        grammar = None
        if request.sampling.grammar is not None and self._grammars is not None:
            grammar = self._grammars.start(request.sampling.grammar)
        state = SamplingState(request, ending_ids(request, self._eos_ids), grammar)
        self._scheduler.add(Sequence(request, self._make_text(request), state, self._eos_ids))

    def evict(self, request_id: str) -> None:
        """Drops a request, wherever it is; its slots are free from the next step on."""
        self._scheduler.cancel(request_id)

    def run(self, max_steps: int) -> list[TokenEvent]:
        """Rank 0's part of one handler call: one step at least, `max_steps` while nothing new has to be answered.

        A call ends early when a prompt was admitted (its first token should leave) or nothing is left to do.
        """
        events: list[TokenEvent] = []
        for step in range(max_steps):
            last = step == max_steps - 1 or self._scheduler.can_admit or not self._scheduler.has_work
            events += self._step(self._scheduler.plan(last))
            if last:
                break
        return events

    def follow(self) -> None:
        """Any other rank's part of one handler call: executes plans up to the last one."""
        while True:
            plan = self._channel.receive()
            self._runner.execute(plan)
            if plan.last:
                return

    def _step(self, plan: Plan) -> list[TokenEvent]:
        self._channel.send(plan)
        logits = self._runner.execute(plan)
        if logits is None:
            return []
        sequences = self._scheduler.rows(plan)
        tokens = choose(logits.next, [sequence.state for sequence in sequences])
        logprobs = _logprobs(logits, sequences, tokens)
        asking = [s for s in sequences[len(plan.tokens) :] if s.request.prompt_logprobs]
        for sequence, prompt in zip(asking, logits.prompts, strict=True):
            sequence.report_prompt(prompt)
        return [self._accept(*row) for row in zip(sequences, tokens, logprobs, strict=True)]

    def _accept(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Enters a sequence's next token; at its end the row is freed in the next step."""
        try:
            wants_none = sequence.request.max_new_tokens == 0
            event = sequence.finish_empty() if wants_none else sequence.accept(token, logprob)
        except Exception as error:  # must not keep rank 0 from sending the plan that the others wait for
            logger.error("[dsserve] %s: %s while decoding text", sequence.request.request_id, type(error).__name__)
            event = sequence.failure()
        if event.is_last:
            self._scheduler.end(sequence)
        return event


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
