"""The AutoTP engine: continuous batching over KV slots, led by rank 0.

Rank 0 admits, evicts and steps; the other ranks follow its plans. Does not parse requests or render replies.
"""

from __future__ import annotations

from collections.abc import Callable

from dsserve.distributed import RankInfo
from dsserve.generation.detokenizer import TextStream
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.plan import Plan, PlanChannel
from dsserve.generation.request import GenerationRequest
from dsserve.generation.sampler import choose_greedily
from dsserve.generation.scheduler import Scheduler, TokenEvent


class Engine:
    """One rank's engine. `admit`, `evict` and `step` are rank 0's; all others call `follow` once a handler call.

    Args:
        runner: the sharded model with its KV slots.
        make_text: a fresh incremental detokenizer for a request.
        eos_ids: the tokens that end a text.
    """

    def __init__(
        self,
        runner: ModelRunner,
        rank: RankInfo,
        make_text: Callable[[GenerationRequest], TextStream],
        eos_ids: frozenset[int],
    ) -> None:
        self._runner = runner
        self._channel = PlanChannel(rank.rank, rank.world_size)
        self._scheduler = Scheduler(runner.slots, make_text, eos_ids)

    @property
    def running(self) -> int:
        """Requests that hold a KV slot."""
        return self._scheduler.running

    def admit(self, request: GenerationRequest) -> None:
        """Queues a request; it is prefilled in the next step that has a free slot."""
        self._scheduler.add(request)

    def evict(self, request_id: str) -> None:
        """Drops a request, wherever it is; its slot is free from the next step on."""
        self._scheduler.cancel(request_id)

    def run(self, max_steps: int) -> list[TokenEvent]:
        """Rank 0's part of one handler call: one step at least, `max_steps` while nothing new has to be answered.

        A call ends early when a prompt was admitted (its first token should leave) or nothing is left to do.
        """
        events: list[TokenEvent] = []
        for step in range(max_steps):
            last = step == max_steps - 1 or self._scheduler.has_waiting or not self._scheduler.has_work
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
        greedy = choose_greedily(logits)
        events = []
        for row, sequence in enumerate(self._scheduler.rows(plan)):
            token = greedy[row] if sequence.sampler.greedy else sequence.sampler.choose(logits[row])
            events.append(self._scheduler.accept(sequence, token))
        return events
