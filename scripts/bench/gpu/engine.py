"""The engine alone, without HTTP: decode steps, first tokens, and what a long prompt does to a running stream.

All ranks run it: rank 0 leads and reads the times off the engine's own observer, the others follow. Does not load the
model (`rank`).
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import torch

from dsserve.core.request import GenerationRequest, StopConditions
from dsserve.core.timeline import Timeline
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Observer, Outcome, Step
from dsserve.engine.sequence import Sequence
from dsserve.parallel.rank import RankInfo
from scripts.bench.report import percentile

Prompt = tuple[int, ...]
STEPS_A_CALL = 64
# A running stream's steps before the long prompt comes, which are the idle ones.
IDLE_STEPS = 24


class Watch(Observer):
    """Keeps what happened since `clear`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.timelines: list[Timeline] = []

    def clear(self) -> None:
        self.steps, self.timelines = [], []

    def stepped(self, step: Step) -> None:
        """See `Observer`."""
        self.steps.append(step)

    def ended(self, sequence: Sequence, outcome: Outcome) -> None:
        """See `Observer`."""
        self.timelines.append(sequence.timeline)


class Group:
    """The ranks' engines, called together.

    Args:
        watch: the observer of rank 0's engine.
    """

    def __init__(self, engine: Engine, rank: RankInfo, watch: Watch) -> None:
        self._engine = engine
        self._rank = rank
        self._watch = watch

    def follow(self) -> None:
        """The other ranks' part of everything below, until `end`."""
        while self._say(False):
            self._engine.follow()

    def end(self) -> None:
        """Rank 0: the others need not follow any more."""
        self._say(False)

    def _say(self, more: bool) -> bool:
        """Rank 0's word on all ranks, before each call."""
        if self._rank.world_size == 1:
            return more
        word = torch.tensor([int(more)])
        torch.distributed.broadcast(word, src=0)
        return bool(word.item())

    def _call(self, max_steps: int = STEPS_A_CALL) -> None:
        self._say(True)
        self._engine.run(max_steps)

    def _drain(self) -> None:
        while self._engine.running or self._engine.waiting:
            self._call()

    def together(self, prompts: list[Prompt], new_tokens: int) -> dict[str, Any]:
        """All prompts at once, each to `new_tokens`: seconds between the steps' ends while all decode, seconds to each
        first token, tokens a second of it all."""
        self._watch.clear()
        for index, prompt in enumerate(prompts):
            self._engine.admit(_request(str(index), prompt, new_tokens))
        self._drain()
        times, count = self._watch.timelines, len(prompts)
        gaps = [
            after.ended - before.ended
            for before, after in pairwise(self._watch.steps)
            if after.decoded == count and after.read == 0
        ]
        first = [(time.first_token or 0.0) - time.arrived for time in times]
        wall = max(time.last_token or 0.0 for time in times) - min(time.arrived for time in times)
        return {"gaps": gaps, "first": first, "tokens_per_s": count * new_tokens / wall}

    def admit_beside(self, short: Prompt, long: Prompt, room: int) -> dict[str, Any]:
        """A stream runs, then a long prompt comes: seconds between the stream's tokens before, and until the other's
        first token; `room` bounds the stream's length."""
        self._watch.clear()
        self._engine.admit(_request("stream", short, room))
        while len(self._watch.steps) <= IDLE_STEPS:
            self._call(1)
        before = len(self._watch.steps)
        self._engine.admit(_request("long", long, 1))
        while not self._watch.timelines:
            self._call(1)
        ends = [step.ended for step in self._watch.steps]
        gaps = [later - earlier for earlier, later in pairwise(ends)]
        time = self._watch.timelines[0]
        self._engine.evict("stream")
        self._call(1)
        first = (time.first_token or 0.0) - time.arrived
        return {"idle": gaps[1 : before - 1], "beside": gaps[before - 1 :], "first": first}


def _request(name: str, prompt: Prompt, new_tokens: int) -> GenerationRequest:
    return GenerationRequest(name, prompt, new_tokens, stop=StopConditions(ignore_eos=True))


def summarise(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds and rates of several rounds of `together`."""
    gaps = [gap * 1e3 for found in rounds for gap in found["gaps"]]
    first = [time * 1e3 for found in rounds for time in found["first"]]
    return {
        "step_ms": round(median(gaps), 3),
        "inter_token_ms_p95": round(percentile(gaps, 95), 3),
        "first_token_ms_median": round(median(first), 2),
        "first_token_ms_p95": round(percentile(first, 95), 2),
        "last_first_token_ms": round(median(max(found["first"]) for found in rounds) * 1e3, 2),
        "tokens_per_s": round(median(found["tokens_per_s"] for found in rounds), 1),
    }


def summarise_admission(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of several rounds of `admit_beside`."""
    idle = [gap * 1e3 for found in rounds for gap in found["idle"]]
    beside = [gap * 1e3 for found in rounds for gap in found["beside"]]
    return {
        "idle_step_ms": round(median(idle), 3),
        "inter_token_ms_median": round(median(beside), 3),
        "inter_token_ms_p95": round(percentile(beside, 95), 3),
        "inter_token_ms_max": round(max(beside), 3),
        "tokens_in_between": round(len(beside) / len(rounds), 1),
        "long_first_token_ms": round(median(found["first"] for found in rounds) * 1e3, 2),
    }
