"""The cost model's numbers as Markdown tables, as they stand in docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scripts.cost.fit import Point, errors, errors_left_out
from scripts.cost.terms import EXPECTED, GROWTH, RANKS, ROWS, WORST, CostModel, Costs, Measurements


def error_table(given: Measurements, points: list[Point], costs: dict[str, Costs]) -> str:
    """Every measured step beside the model's."""
    rows = [
        [p.engine, p.gpu, str(p.ranks), str(p.rows), f"{p.ms:.2f}", f"{p.ms * (1 + error):.2f}", f"{error:+.1%}"]
        for p, error in zip(points, errors(given, points, costs), strict=True)
    ]
    return _markdown(["engine", "GPU", "ranks", "rows", "measured ms", "model ms", "error"], rows)


def summary_table(given: Measurements, points: list[Point], costs: dict[str, Costs]) -> str:
    """Each engine's costs and errors, and those of all points; the latency is one for all."""
    found, model = [errors(given, points, costs), errors_left_out(given, points)], CostModel(given)

    def cells(engine: str | None) -> list[str]:
        chosen = [index for index, p in enumerate(points) if engine in (None, p.engine)]
        sizes = [[abs(kind[index]) for index in chosen] for kind in found]
        return [f"{sum(kind) / len(kind):.1%} / {max(kind):.1%}" for kind in sizes]

    def fastest(c: Costs) -> str:
        laws = [model.fastest(c, growth) for growth in (EXPECTED, WORST)]
        return f"{laws[0][0]:.1f} ms on {laws[0][1]} ({WORST}: {laws[1][0]:.1f} on {laws[1][1]})"

    rows = [
        [name, f"{c.fixed_us:.0f}", f"{c.row_us:.2f}", f"{c.latency_us:.1f}", *cells(name), fastest(c)]
        for name, c in costs.items()
    ]
    titles = ["engine", "µs a layer", "µs a layer and row", "µs an all-reduce, 2 ranks", "error, mean / worst"]
    all_points = ["all", "", "", "", *cells(None), ""]
    return _markdown([*titles, "points left out", "fastest single row, at most 8 ranks"], [*rows, all_points])


def prediction_table(given: Measurements, costs: dict[str, Costs]) -> str:
    """Steps on more ranks, and from where on replicas win."""
    rows = []
    for engine in given.engines:
        measured = {series.ranks for series in engine.points}
        for ranks in RANKS:
            kind = "fitted" if ranks in measured else "**predicted**"
            rows.append([engine.name, f"{ranks}, {kind}", *_prediction(CostModel(given), costs[engine.name], ranks)])
    titles = [
        f"ms a step, {' / '.join(map(str, ROWS))} rows",
        f"{ROWS[0]} row, range",
        f"tokens/s a GPU, {ROWS[-1]} rows",
    ]
    return _markdown(["engine", "ranks", *titles, "two replicas of half the ranks win from"], rows)


def other_table(given: Measurements, costs: dict[str, Costs]) -> str:
    """Measured steps of other shapes beside what the costs say for them."""
    rows = []
    for other in given.others:
        shaped = given.model_copy(update={"shape": other.shape})
        for series in other.points:
            model, cells = CostModel(shaped, series.gpu), [other.name, other.engine, series.gpu, str(series.ranks)]
            found = {count: model.step_ms(costs[other.engine], series.ranks, count) for count in series.ms}
            floor = [model.read_ms(series.ranks, count) for count in series.ms]
            worst = max((found[count] / ms - 1 for count, ms in series.ms.items()), key=abs)
            rows.append([*cells, _listed(series.ms.values()), _listed(found.values()), f"{worst:+.1%}", _listed(floor)])
    titles = ["shape", "engine", "GPU", "ranks", f"measured ms, {' / '.join(map(str, ROWS))} rows", "model ms"]
    return _markdown([*titles, "largest error", "floor ms"], rows)


def _prediction(model: CostModel, costs: Costs, ranks: int) -> list[str]:
    steps = [model.step_ms(costs, ranks, rows) for rows in ROWS]
    single = [model.step_ms(costs, ranks, ROWS[0], growth) for growth in GROWTH]
    spread = f"{min(single):.1f} to {max(single):.1f}" if ranks > 2 else ""
    wins = {growth: model.rows_where_replicas_win(costs, ranks, growth) for growth in GROWTH}
    rate = ROWS[-1] / steps[-1] * 1e3 / ranks
    return [_listed(steps), spread, f"{rate:.0f}", _rows_text(wins)]


def _listed(milliseconds: Iterable[float]) -> str:
    return " / ".join(f"{ms:.1f}" for ms in milliseconds)


def _rows_text(wins: dict[str, float]) -> str:
    """The rows by the expected law, and the range of all where they differ."""

    def text(rows: float) -> str:
        return "never" if math.isinf(rows) else str(max(1, math.ceil(rows)))

    least, most = text(min(wins.values())), text(max(wins.values()))
    return f"{text(wins[EXPECTED])} rows" + ("" if least == most else f" ({least} to {most})")


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
