"""What all ranks do in the next step, and the channel on which rank 0 tells them.

A plan is a short list of integers; every step starts with one, so every call of the handler holds a collective (ranks
above 0 lose calls otherwise) and all ranks see the same requests. Decides nothing (`scheduler`), computes nothing
(`model_runner`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dsserve import distributed

# One frame of the shared-memory all-reduce: 64 fp32 values take about 2 us (gloo's broadcast takes 120).
FRAME = 64


@dataclass(frozen=True)
class Plan:
    """One step: evict, then decode the live rows, then prefill the admitted prompts.

    Attributes:
        evict: rows to free, in this order; the last live row moves into each hole.
        tokens: the input token of each live row after the evictions; empty = no decode in this step.
        admit: the prompts to prefill; each takes the next free row.
        last: the handler's call ends after this step.
    """

    evict: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    admit: tuple[tuple[int, ...], ...] = field(default=())
    last: bool = False

    def encode(self) -> list[int]:
        """Length-prefixed integers, each below 2**24, so that fp32 holds them exactly."""
        numbers = [int(self.last), len(self.evict), *self.evict, len(self.tokens), *self.tokens, len(self.admit)]
        for prompt in self.admit:
            numbers += [len(prompt), *prompt]
        return numbers

    @classmethod
    def decode(cls, numbers: list[int]) -> Plan:
        position = 1

        def take() -> tuple[int, ...]:
            nonlocal position
            end = position + 1 + numbers[position]
            taken = tuple(numbers[position + 1 : end])
            position = end
            return taken

        evict, tokens = take(), take()
        prompts = numbers[position]
        position += 1
        return cls(evict, tokens, tuple(take() for _ in range(prompts)), bool(numbers[0]))


class PlanChannel:
    """Carries plans from rank 0 to all others. One rank alone needs no channel and gets one that does nothing.

    Shared memory where DeepSpeed's all-reduce is loaded (rank 0 gives the numbers, the others zeros), else gloo.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._alone = world_size == 1
        self._shared = not self._alone and distributed.uses_shared_memory()

    def send(self, plan: Plan) -> None:
        """Rank 0: hands `plan` to all ranks."""
        if self._alone:
            return
        numbers = plan.encode()
        head = [len(numbers), *numbers[: FRAME - 1]]
        self._exchange(head + [0] * (FRAME - len(head)))
        if len(numbers) >= FRAME:
            self._exchange(numbers[FRAME - 1 :])

    def receive(self) -> Plan:
        """Other ranks: waits for the next plan."""
        head = self._exchange([0] * FRAME)
        length = head[0]
        numbers = head[1 : length + 1]
        if length >= FRAME:
            numbers += self._exchange([0] * (length - FRAME + 1))
        return Plan.decode(numbers)

    def _exchange(self, numbers: list[int]) -> list[int]:
        if self._shared:
            return [int(value) for value in distributed.all_reduce(torch.tensor(numbers, dtype=torch.float32)).tolist()]
        values = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.broadcast(values, src=0)
        return values.tolist()
