"""What the ranks do for `test_preemption`: schedules on few pages, so that texts lose theirs, and each text alone."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from typing import Any

import torch

from dsserve.core.request import StopConditions
from dsserve.core.step_plan import StepPlan
from dsserve.engine.engine import Engine
from dsserve.kernels.ops import load_ops
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.base import StepLogits
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.programs.distributed.steps import make_sharded
from tests.support.paged import make_engine, make_scheduler
from tests.support.schedules import CONTEXT, EOS, Schedule, differences, make_text, play

ROWS, PAGE = 6, 4


class Replaying(ModelRunner):
    """Keeps a hash of all plans, which must be the same on all ranks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._plans = hashlib.sha256()
        self.steps = 0

    @property
    def plans(self) -> str:
        return self._plans.hexdigest()

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """See `ModelRunner`. Plans that compute nothing end calls, and rank 0 has no need to run them."""
        if plan.segments:
            numbers = StepPlan(plan.segments).encode()  # rank 0's last plan of a call may say so by another one
            self._plans.update(json.dumps(numbers).encode())
            self.steps += 1
        return super().execute(plan, chosen)


def texts(path: str, seeds: list[int], device_type: str = "cpu") -> dict[str, Any]:
    """fp32, greedy and sampled texts, some of whose clients leave; every other seed's steps are launched ahead.

    Returns:
        What differs from each text alone, schedule by schedule; how often a text was put back in each; the plans' hash
        and how many there were, on every rank.
    """
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    module = make_sharded(path, "fp32", device_type).module
    if device.type == "cuda":  # graphs need the fused writes to the cache
        assert load_ops(device) is not None
    one = ModelRunner(module, KVSize.of_rows(1, CONTEXT, PAGE), rank, device)
    alone = make_engine(one, make_scheduler(one.size, reuse=False), make_text, rank, EOS)
    found: dict[str, Any] = {"differences": [], "preemptions": [], "plans": [], "steps": 0}
    for seed in seeds:
        schedule, dice = draw_crowd(seed), random.Random(seed)
        least = -(-CONTEXT // PAGE)
        size = KVSize(ROWS, CONTEXT, dice.randrange(least, least + 6), PAGE)
        runner = Replaying(module, size, rank, device)
        engine = make(runner, rank, device, is_ahead=bool(seed % 2), chunk=dice.choice([5, 16, CONTEXT]))
        played = play(alone, rank, schedule, cancel=False), play(engine, rank, schedule)
        if rank.is_leader:
            found["differences"] += [f"{seed}: {line}" for line in differences(schedule, *played)]
            found["preemptions"].append(engine._scheduler.preemptions)
            assert engine._scheduler.running == 0
        found["plans"].append(runner.plans)
        found["steps"] += runner.steps
    return found


def draw_crowd(seed: int) -> Schedule:
    """A schedule whose texts come soon, one after the other, and most of which go on to the end of the context."""
    schedule, dice = Schedule.draw(seed, count=8), random.Random(seed)
    for name, request in schedule.requests.items():
        schedule.arrivals[name] //= 4
        if request.max_new_tokens and dice.random() < 0.7:
            more = {"max_new_tokens": CONTEXT - len(request.prompt_ids), "stop": StopConditions(ignore_eos=True)}
            schedule.requests[name] = replace(request, **more)
    return schedule


def make(runner: ModelRunner, rank: RankInfo, device: torch.device, is_ahead: bool, chunk: int) -> Engine:
    sampler = DeviceSampler(runner.rows, runner.vocabulary, device)
    if device.type == "cuda":
        runner.capture_graphs(rank.is_leader, CONTEXT)
        sampler.capture(runner.graph_pool)
    launch = sampler.launch if is_ahead else HostChoice
    scheduler = make_scheduler(runner.size, 2 * chunk, chunk, ratio=0.5)
    return make_engine(runner, scheduler, make_text, rank, EOS, launch=launch, launch_ahead=is_ahead)
