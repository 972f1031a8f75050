"""What the ranks do for `test_ahead`: the same schedules with and without steps that are launched ahead."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.step_plan import StepPlan
from dsserve.engine.engine import Engine
from dsserve.kernels.ops import load_ops
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.base import StepLogits
from dsserve.sampling import gpu_sampler
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.programs.distributed.steps import make_sharded
from tests.support.paged import make_engine, make_scheduler
from tests.support.schedules import CONTEXT, EOS, PART, SLOTS, Schedule, differences, draw_less, make_text, play

PAGE = 8  # tokens


class Counting(ModelRunner):
    """Counts steps: all that compute, those launched ahead, those of which a row was void and is computed again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts = [0, 0, 0]
        self._ends: dict[int, int] = {}  # of what was computed in each row

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """See `ModelRunner`."""
        # A text that is new in its row gets its pages from the first one on.
        again = [s.first_block > 0 and s.start < self._ends.get(s.row, 0) for s in plan.segments]
        for at, happens in enumerate((plan.segments, plan.is_ahead, any(again))):
            self.counts[at] += bool(happens)
        self._ends |= {segment.row: segment.end for segment in plan.segments}
        return super().execute(plan, chosen)


def texts(path: str, seeds: list[int], share: float, device_type: str = "cpu") -> dict[str, Any]:
    """fp32: what differs, schedule by schedule, and the counts of `Counting`, on every rank. GPUs use graphs.

    Args:
        share: of the sampled rows that are left to the host, so that they are void in the step behind.
    """
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    module = make_sharded(path, "fp32", device_type).module
    if device.type == "cuda":  # graphs need the fused writes to the cache
        assert load_ops(device) is not None
    gpu_sampler.draw = draw_less(share)
    size = KVSize.of_rows(SLOTS, CONTEXT, PAGE)
    runners = [Counting(module, size, rank, device) for _ in range(2)]
    engines = [make(runner, rank, device, ahead) for runner, ahead in zip(runners, (False, True), strict=True)]
    found: dict[str, Any] = {"differences": []}
    for seed in seeds:
        schedule = Schedule.draw(seed)
        played = [play(engine, rank, schedule, cancel=engine is engines[1]) for engine in engines]
        if rank.is_leader:
            found["differences"] += differences(schedule, *played)
    return {**found, "counts": runners[1].counts}


def make(runner: ModelRunner, rank: RankInfo, device: torch.device, ahead: bool) -> Engine:
    """Pages for every text of the whole length; prompts are read in parts of `PART` tokens."""
    sampler = DeviceSampler(runner.rows, runner.vocabulary, device)
    if device.type == "cuda":
        runner.capture_graphs(rank.is_leader, CONTEXT * SLOTS)
        sampler.capture(runner.graph_pool)
    scheduler = make_scheduler(runner.size, PART)
    launch = sampler.launch if ahead else HostChoice
    return make_engine(runner, scheduler, make_text, rank, EOS, launch=launch, launch_ahead=ahead)
