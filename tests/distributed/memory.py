"""What the ranks do for `test_memory`: prompts that do not fit into the memory of one rank, beside some that do."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.distributed import RankInfo
from dsserve.generation.engine import Engine
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.prefill_memory import PrefillMemory
from dsserve.generation.request import GenerationRequest, TokenEvent
from tests.distributed.steps import make_engine
from tests.streams import Numbers, more

SLOTS, CONTEXT, NEW_TOKENS = 4, 128, 8
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
    module = make_engine(path, "fp32").module
    generator = torch.Generator().manual_seed(3)

    def request(name: str, length: int) -> GenerationRequest:
        prompt = torch.randint(module.config.vocab_size, (length,), generator=generator).tolist()
        return GenerationRequest(name, tuple(prompt), NEW_TOKENS)

    first, long = request("first", 10), request("long", LONGEST + 1)
    together = [request(name, LONGEST // 2 + 5) for name in ("a", "b", "c")]
    arrivals = [[first], [long], together, [request("last", 7)]]
    alone: dict[str, Any] = {}
    for wanted in [first, *together, arrivals[-1][0]]:
        alone |= run(make(module, rank, PrefillMemory), rank, [[wanted]])
    return {"alone": alone, "scarce": run(make(module, rank, Scarce), rank, arrivals)}


def give_up(path: str) -> str:
    """How the engine ends when one prompt after the other fails that had room at load: rank 0's words."""
    rank = RankInfo.from_env()
    engine = make(make_engine(path, "fp32").module, rank, Scarce)
    wanted = [GenerationRequest(str(index), (1,) * (LONGEST + 5), NEW_TOKENS) for index in range(3)]
    try:
        found = run(engine, rank, [[one] for one in wanted])
    except torch.OutOfMemoryError as error:
        return str(error)
    return str(found)


def make(module: Any, rank: RankInfo, memory: type[PrefillMemory]) -> Engine:
    device = torch.device("cpu")
    runner = ModelRunner(module, SLOTS, CONTEXT, device, memory=memory(device, rank, module.config.vocab_size))
    return Engine(runner, rank, lambda _: Numbers(), frozenset())  # type: ignore[arg-type, return-value]


def run(engine: Engine, rank: RankInfo, arrivals: list[list[GenerationRequest]]) -> dict[str, Any]:
    """Runs until all have ended; each group arrives one call later. Other ranks follow, and return nothing."""
    found: dict[str, Any] = {request.request_id: "" for group in arrivals for request in group}
    open_ = set(found)
    while more(rank, bool(open_)):
        if not rank.is_leader:
            engine.follow()
            continue
        for request in arrivals.pop(0) if arrivals else []:
            engine.admit(request)
        for event in engine.run(max_steps=2):
            _enter(event, found)
            open_ -= {event.request_id} if event.is_last else set()
    return found


def _enter(event: TokenEvent, found: dict[str, Any]) -> None:
    if event.failed:
        found[event.request_id] = event.error.status if event.error else 500
    else:
        found[event.request_id] += event.text
