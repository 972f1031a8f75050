"""What the ranks do for `test_memory`: prompts that do not fit into the memory of one rank, beside some that do."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.core.request import GenerationRequest
from dsserve.engine.engine import Engine
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.warmup import warm_up
from tests.programs.distributed.steps import make_sharded
from tests.support.paged import make_engine, make_scheduler
from tests.support.streams import Numbers, run_or_fail

ROWS, CONTEXT, NEW_TOKENS = 4, 128, 8
LONGEST = 40  # tokens of a pass


class Scarce(PrefillMemory):
    """Rank 1, or the only rank, has room for `LONGEST` tokens; says so as a device does."""

    is_limited = True  # type: ignore[assignment]

    def has_room(self, tokens: int, logits: int) -> bool:
        return self._rank.rank != self._rank.world_size - 1 or tokens <= LONGEST

    def _learn(self, tokens: int) -> None:
        pass


def answers(path: str) -> dict[str, Any]:
    """Each request's text, or its error's status: alone with memory enough, then all with scarce memory."""
    rank = RankInfo.from_env()
    module = make_sharded(path, "fp32").module
    generator = torch.Generator().manual_seed(3)

    def request(name: str, length: int) -> GenerationRequest:
        prompt = torch.randint(module.config.vocab_size, (length,), generator=generator).tolist()
        return GenerationRequest(name, tuple(prompt), NEW_TOKENS)

    first, long = request("first", 10), request("long", LONGEST + 1)
    together = [request(name, LONGEST // 2 + 5) for name in ("a", "b", "c")]
    arrivals = [[first], [long], together, [request("last", 7)]]
    alone: dict[str, Any] = {}
    for wanted in [first, *together, arrivals[-1][0]]:
        alone |= run_or_fail(make(module, rank, PrefillMemory), rank, [[wanted]])
    return {"alone": alone, "scarce": run_or_fail(make(module, rank, Scarce), rank, arrivals)}


def give_up(path: str) -> str:
    """How the engine ends when one prompt after the other fails that had room at load: rank 0's words."""
    rank = RankInfo.from_env()
    engine = make(make_sharded(path, "fp32").module, rank, Scarce)
    wanted = [GenerationRequest(str(index), (1,) * (LONGEST + 5), NEW_TOKENS) for index in range(3)]
    try:
        found = run_or_fail(engine, rank, [[one] for one in wanted])
    except torch.OutOfMemoryError as error:
        return str(error)
    return str(found)


def load(path: str) -> str:
    """What a load says whose first passes do not fit."""
    rank = RankInfo.from_env()
    runner = make_runner(make_sharded(path, "fp32").module, rank, Scarce)
    try:
        warm_up(runner, rank.is_leader, runner.rows)
    except LoadError as error:
        return str(error)
    return ""


def make(module: Any, rank: RankInfo, memory: type[PrefillMemory]) -> Engine:
    runner = make_runner(module, rank, memory)
    return make_engine(runner, make_scheduler(runner.size), lambda _: Numbers(), rank)


def make_runner(module: Any, rank: RankInfo, memory: type[PrefillMemory]) -> ModelRunner:
    device = torch.device("cpu")
    size = KVSize.of_rows(ROWS, CONTEXT)
    return ModelRunner(module, size, rank, device, memory(device, rank, module.config.vocab_size))
