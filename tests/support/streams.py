"""Greedy requests through an engine, on every rank, as token numbers: what the tests of several folders share."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.request import GenerationRequest
from dsserve.engine.engine import Engine
from dsserve.parallel.rank import RankInfo


class Numbers:
    """In a detokenizer's place: the tokens themselves."""

    stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        return f"{token} "

    def extend(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return ""


def run(engine: Engine, rank: RankInfo, arrivals: list[list[GenerationRequest]]) -> dict[str, list[int]]:
    """Runs until all have ended; each group arrives one call later. Other ranks follow, and return nothing."""
    texts = run_or_fail(engine, rank, arrivals)
    return {name: [int(number) for number in text.split()] for name, text in texts.items()}


def run_or_fail(engine: Engine, rank: RankInfo, arrivals: list[list[GenerationRequest]]) -> dict[str, Any]:
    """As `run`; the tokens as text, or the status of the error that a request got in their place."""
    found: dict[str, Any] = {request.request_id: "" for group in arrivals for request in group}
    open_ = set(found)
    while more(rank, bool(open_)):
        if not rank.is_leader:
            engine.follow()
            continue
        for request in arrivals.pop(0) if arrivals else []:
            engine.admit(request)
        for event in engine.run(max_steps=2):
            failure = event.error.status if event.error else 500
            found[event.request_id] = failure if event.failed else found[event.request_id] + event.text
            open_ -= {event.request_id} if event.is_last else set()
    return found


def more(rank: RankInfo, wanted: bool) -> bool:
    """Rank 0's word on every rank."""
    if rank.world_size == 1:
        return wanted
    box = [wanted]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
