"""Requests for the simulation: when they come, how long they are, which beginning they share. Repeatable by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from scripts.bench.open_load import poisson

POISSON, BURSTY = "poisson", "bursty"
ARRIVALS = (POISSON, BURSTY)
# Bursty: a fifth of the time at twice the mean rate, in spells of a second on average.
BURST_SHARE, BURST_TIMES, BURST_S = 0.2, 2.0, 1.0


class Job(NamedTuple):
    """One request. `beginning`: whose `shared_tokens` its prompt has; where they are kept they need no prefill."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    beginning: int
    shared_tokens: int


@dataclass(frozen=True)
class Demand:
    """A load.

    Args:
        prompt_tokens: of every prompt; `shared_tokens` of them are one of `beginnings` texts.
        new_tokens: mean; `fixed` = every request has so many, else lengths are exponential (at least 1).
    """

    rate_per_s: float
    prompt_tokens: int
    new_tokens: int
    arrivals: str = POISSON
    fixed: bool = False
    beginnings: int = 1
    shared_tokens: int = 0

    def jobs(self, seconds: float, seed: int) -> list[Job]:
        """All requests of `seconds`, in order of their arrival."""
        dice = random.Random(seed + 1)
        bursty = self.arrivals == BURSTY
        moments = bursts(self.rate_per_s, seconds, seed) if bursty else poisson(self.rate_per_s, seconds, seed)
        return [
            Job(at, self.prompt_tokens, self._length(dice), dice.randrange(self.beginnings), self.shared_tokens)
            for at in moments
        ]

    def _length(self, dice: random.Random) -> int:
        return self.new_tokens if self.fixed else max(1, round(dice.expovariate(1 / self.new_tokens)))


def bursts(rate_per_s: float, seconds: float, seed: int) -> Iterator[float]:
    """Arrivals whose rate changes between two values, when is up to `seed` alone; the mean is `rate_per_s`."""
    dice, spells = random.Random(seed), random.Random(seed + 2)
    calm_rate = rate_per_s * (1 - BURST_SHARE * BURST_TIMES) / (1 - BURST_SHARE)
    calm_s = BURST_S * (1 - BURST_SHARE) / BURST_SHARE
    start, busy = 0.0, False
    while start < seconds:
        end = start + spells.expovariate(1 / (BURST_S if busy else calm_s))
        now = start
        while (now := now + dice.expovariate(rate_per_s * BURST_TIMES if busy else calm_rate)) < min(end, seconds):
            yield now
        start, busy = end, not busy
