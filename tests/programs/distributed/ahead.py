"""What the ranks do for `test_ahead`: the same schedules with and without steps that are launched ahead."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.step_plan import Plan
from dsserve.engine import engine as engine_module
from dsserve.engine.engine import Engine
from dsserve.engine.scheduler import Scheduler
from dsserve.kv.prefix_cache import PrefixCache
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.base import StepLogits
from dsserve.sampling import gpu_sampler
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.programs.distributed.steps import make_engine
from tests.support.schedules import CONTEXT, EOS, KEPT, PART, SLOTS, Schedule, differences, draw_less, make_text, play


class Counting(ModelRunner):
    """Counts steps: all that compute, those launched ahead, those that were void."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts = [0, 0, 0]

    def execute(self, plan: Plan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        for at, happens in enumerate((plan.tokens or plan.admit, plan.ahead, plan.rewind)):
            self.counts[at] += bool(happens)
        return super().execute(plan, chosen)


def texts(path: str, seeds: list[int], share: float, device_type: str = "cpu") -> dict[str, Any]:
    """fp32: what differs, schedule by schedule, and the counts of `Counting`, on every rank. GPUs use graphs.

    Args:
        share: of the sampled rows that are left to the host, so that the step behind them is void.
    """
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    module = make_engine(path, "fp32", device_type).module
    gpu_sampler.draw = draw_less(share)
    engine_module.STEPS_AFTER_VOID = 2
    runners = [Counting(module, SLOTS, CONTEXT, device, KEPT) for _ in range(2)]
    engines = [make(runner, rank, device, ahead) for runner, ahead in zip(runners, (False, True), strict=True)]
    found: dict[str, Any] = {"differences": []}
    for seed in seeds:
        schedule = Schedule.draw(seed)
        played = [play(engine, rank, schedule, cancel=engine is engines[1]) for engine in engines]
        if rank.is_leader:
            found["differences"] += differences(schedule, *played)
    return {**found, "counts": runners[1].counts}


def make(runner: ModelRunner, rank: RankInfo, device: torch.device, ahead: bool) -> Engine:
    sampler = DeviceSampler(runner.slots, runner.vocabulary, device)
    if device.type == "cuda":
        runner.capture_graphs(rank.is_leader)
        sampler.capture(runner.graph_pool)
    scheduler = Scheduler(SLOTS, PrefixCache(SLOTS, KEPT), PART)
    launch = sampler.launch if ahead else HostChoice
    return Engine(runner, rank, make_text, frozenset({EOS}), None, None, scheduler, launch, ahead)
