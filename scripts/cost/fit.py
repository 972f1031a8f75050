"""Fits the costs of a decode step to measured ones, and says how far off they are.

One `fixed` and one `row` for each engine; one `latency` for all, since it belongs to the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scripts.cost.terms import CostModel, Costs, Measurements


class Point(NamedTuple):
    """One measured step."""

    engine: str
    ranks: int
    rows: int
    gpu: str
    ms: float


def read_points(given: Measurements) -> list[Point]:
    """All measured steps."""

    def points() -> Iterator[Point]:
        for engine in given.engines:
            for series in engine.points:
                for rows, ms in series.ms.items():
                    yield Point(engine.name, series.ranks, rows, series.gpu, ms)

    return list(points())


def fit(given: Measurements, points: list[Point]) -> dict[str, Costs]:
    """Costs of each engine: least squares of the relative errors, no cost below zero."""
    names = [engine.name for engine in given.engines]
    matrix, target = np.zeros((len(points), 2 * len(names) + 1)), np.zeros(len(points))
    for index, point in enumerate(points):
        model, column = CostModel(given, point.gpu), 2 * names.index(point.engine)
        matrix[index, [column, column + 1, -1]] = np.array(model.factors(point.ranks, point.rows)) / point.ms
        target[index] = 1 - model.given_ms(point.ranks, point.rows) / point.ms
    solution = solve_not_negative(matrix, target)
    return {
        name: Costs(float(solution[2 * i]), float(solution[2 * i + 1]), float(solution[-1]))
        for i, name in enumerate(names)
    }


def solve_not_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares; unknowns that come out below zero are set to zero and the others solved again."""
    used = np.arange(matrix.shape[1])
    while True:
        part = np.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
        if (part >= 0).all():
            solution = np.zeros(matrix.shape[1])
            solution[used] = part
            return solution
        used = used[part > 0]


def errors(given: Measurements, points: list[Point], costs: dict[str, Costs]) -> list[float]:
    """(model - measured) / measured of each point."""
    return [CostModel(given, p.gpu).step_ms(costs[p.engine], p.ranks, p.rows) / p.ms - 1 for p in points]


def errors_left_out(given: Measurements, points: list[Point]) -> list[float]:
    """The same, of each point by the costs that all other points give."""
    others = [points[:index] + points[index + 1 :] for index in range(len(points))]
    return [errors(given, [p], fit(given, rest))[0] for p, rest in zip(points, others, strict=True)]
