"""The terms of one decode step's cost, and the form of the measurements they are fitted to.

    ms = (weights + KV) / ranks / read bandwidth                   what one GPU reads
       + layers x (fixed + row x rows)                             launches and small kernels; work that grows with rows
       + 2 x layers x (latency x growth(ranks) + bytes / link)     the all-reduces

Bandwidths are given; `fixed`, `row` and `latency` are fitted (`fit`). Two numbers of ranks cannot show how the
latency grows: three laws are carried through and give the predictions' range. Says nothing of first tokens, of other
shapes' small kernels, or of whether a model fits into a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

# How an all-reduce's latency grows with the ranks; 0 for one rank, 1 for two, which are measured.
GROWTH: dict[str, Callable[[int], float]] = {
    "one exchange": lambda ranks: float(ranks > 1),  # every rank reads all others at once
    "tree": math.log2,
    "ring": lambda ranks: ranks - 1.0,
}
EXPECTED, WORST = "tree", "ring"
ROWS, RANKS = (1, 8, 32, 64), (2, 4, 8)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(Strict):
    """A model: `hidden` values a token between layers; gigabytes (1e9) that a step reads on one rank alone."""

    layers: int
    hidden: int
    bytes_a_value: int
    weights_gb: float
    kv_gb_a_token: float
    comment: str = ""


class Gpu(Strict):
    read_gb_s: float
    source: str


class Series(Strict):
    """Milliseconds a step, by the number of rows."""

    ranks: int
    gpu: str
    ms: dict[int, float]


class Engine(Strict):
    name: str
    points: list[Series]


class Other(Strict):
    """Steps of another shape, which nothing is fitted to: whether the costs hold beyond their own."""

    name: str
    engine: str
    shape: Shape
    points: list[Series]


class Measurements(Strict):
    what: str
    source: str
    shape: Shape
    context_tokens: int
    gpus: dict[str, Gpu]
    link_gb_s: float
    link_source: str
    engines: list[Engine]
    others: list[Other] = []


class Costs(NamedTuple):
    """What is fitted, in microseconds: a layer; a layer and row; an all-reduce between two ranks."""

    fixed_us: float
    row_us: float
    latency_us: float


class CostModel:
    """Terms of a step, in milliseconds, on `gpu` (default: the file's first)."""

    def __init__(self, given: Measurements, gpu: str | None = None) -> None:
        self._given = given
        self._read_gb_s = given.gpus[gpu or next(iter(given.gpus))].read_gb_s

    def read_ms(self, ranks: int, rows: float) -> float:
        """One rank's part of the weights and of all rows' keys and values."""
        shape = self._given.shape
        gigabytes = shape.weights_gb + shape.kv_gb_a_token * self._given.context_tokens * rows
        return gigabytes / ranks / self._read_gb_s * 1e3

    def transfer_ms(self, ranks: int, rows: float) -> float:
        """The bytes of all all-reduces over a GPU's link: 2 (ranks - 1) / ranks of each result leave a rank."""
        shape = self._given.shape
        gigabytes = rows * shape.hidden * shape.bytes_a_value * 2 * (ranks - 1) / ranks / 1e9
        return 2 * shape.layers * gigabytes / self._given.link_gb_s * 1e3

    def factors(self, ranks: int, rows: float, growth: str = EXPECTED) -> Costs:
        """What each fitted cost is multiplied by to give milliseconds."""
        layers = self._given.shape.layers
        return Costs(layers / 1e3, layers * rows / 1e3, 2 * layers * GROWTH[growth](ranks) / 1e3)

    def given_ms(self, ranks: int, rows: float) -> float:
        """What the bandwidths alone take, without any fitted cost."""
        return self.read_ms(ranks, rows) + self.transfer_ms(ranks, rows)

    def step_ms(self, costs: Costs, ranks: int, rows: float, growth: str = EXPECTED) -> float:
        """One decode step of `rows` rows on `ranks` ranks."""
        fitted = sum(a * b for a, b in zip(self.factors(ranks, rows, growth), costs, strict=True))
        return self.given_ms(ranks, rows) + fitted

    def fastest(self, costs: Costs, growth: str = EXPECTED) -> tuple[float, int]:
        """The least milliseconds of a single row on the ranks of one host, and the ranks."""
        return min((self.step_ms(costs, ranks, 1, growth), ranks) for ranks in (1, *RANKS))

    def rows_where_replicas_win(self, costs: Costs, ranks: int, growth: str = EXPECTED) -> float:
        """From how many rows on two replicas of half the ranks, half the rows each, are faster than one group.

        A step is linear in its rows. 0: always; infinity: never."""

        def line(size: int) -> tuple[float, float]:
            start = self.step_ms(costs, size, 0, growth)
            return start, self.step_ms(costs, size, 1, growth) - start

        (half_start, half_slope), (start, slope) = line(ranks // 2), line(ranks)
        gained, lost = half_start - start, slope - half_slope / 2
        if gained <= 0:
            return 0.0
        return gained / lost if lost > 0 else math.inf


def load(path: Path) -> Measurements:
    return Measurements.model_validate_json(path.read_text(encoding="utf-8"))
