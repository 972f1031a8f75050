"""The channel on which rank 0 tells the others what all ranks do in the next step.

Decides nothing (`engine.scheduler`).
"""

from __future__ import annotations

import torch

from dsserve.core.step_plan import StepPlan
from dsserve.parallel import collectives

# One frame of the shared-memory all-reduce: 64 fp32 values take about 2 us (gloo's broadcast takes 120).
FRAME = 64


class PlanChannel:
    """Carries plans from rank 0 to all others. One rank alone needs no channel and gets one that does nothing.

    Shared memory where DeepSpeed's all-reduce is loaded (rank 0 gives the numbers, the others zeros), else gloo.

    Attributes:
        is_open: rank 0: the handler's call did not end for the others yet.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._alone = world_size == 1
        self._shared = not self._alone and collectives.uses_shared_memory()
        self.is_open = True

    def send(self, plan: StepPlan) -> None:
        """Rank 0: hands `plan` to all ranks."""
        self.is_open = not plan.last
        if self._alone:
            return
        numbers = plan.encode()
        head = [len(numbers), *numbers[: FRAME - 1]]
        self._exchange(head + [0] * (FRAME - len(head)))
        if len(numbers) >= FRAME:
            self._exchange(numbers[FRAME - 1 :])

    def end_call(self) -> None:
        """Rank 0: ends the call for all ranks, unless its last plan did; the next plan begins another one."""
        if self.is_open:
            self.send(StepPlan(last=True))
        self.is_open = True

    def receive(self) -> StepPlan:
        """Other ranks: waits for the next plan."""
        head = self._exchange([0] * FRAME)
        length = head[0]
        numbers = head[1 : length + 1]
        if length >= FRAME:
            numbers += self._exchange([0] * (length - FRAME + 1))
        return StepPlan.decode(numbers)

    def _exchange(self, numbers: list[int]) -> list[int]:
        if self._shared:
            return [int(value) for value in collectives.all_reduce(torch.tensor(numbers, dtype=torch.float32)).tolist()]
        values = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.broadcast(values, src=0)
        return values.tolist()
