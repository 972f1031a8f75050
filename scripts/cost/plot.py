"""A picture of the cost model: measured steps as dots, the model as lines, the range of its predictions as bands."""

from __future__ import annotations

from pathlib import Path

from scripts.cost.fit import Point
from scripts.cost.report import prediction_table
from scripts.cost.terms import GROWTH, RANKS, CostModel, Costs, Measurements

PLOTTED_ROWS = ((1, "-"), (32, "--"))


def draw(given: Measurements, points: list[Point], costs: dict[str, Costs], path: Path) -> None:
    """Writes two charts over the ranks: milliseconds a step, and tokens a second of each GPU."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "cost model", "svg.fonttype": "none"})  # the same numbers are the same file
    from matplotlib import pyplot

    figure, (steps, rates) = pyplot.subplots(1, 2, figsize=(10, 4))
    model, ranks = CostModel(given), (1, *RANKS)
    measured_gpu = next(iter(given.gpus))
    for color, (name, c) in enumerate(costs.items()):
        for rows, style in PLOTTED_ROWS:
            line = [model.step_ms(c, size, rows) for size in ranks]
            laws = [[model.step_ms(c, size, rows, growth) for growth in GROWTH] for size in ranks]
            label = f"{name}, {rows} row{'s' * (rows > 1)}"
            steps.plot(ranks, line, style, color=f"C{color}", label=label)
            steps.fill_between(ranks, *([f(law) for law in laws] for f in (min, max)), color=f"C{color}", alpha=0.12)
            rates.plot(
                ranks, [rows / ms * 1e3 / size for ms, size in zip(line, ranks, strict=True)], style, color=f"C{color}"
            )
            found = [p for p in points if (p.engine, p.rows, p.gpu) == (name, rows, measured_gpu)]
            steps.plot([p.ranks for p in found], [p.ms for p in found], "o", color=f"C{color}")
            rates.plot([p.ranks for p in found], [rows / p.ms * 1e3 / p.ranks for p in found], "o", color=f"C{color}")
    steps.set(ylabel="ms a decode step", ylim=(0, None), title="Dots: measured")
    rates.set(ylabel="tokens/s a GPU", yscale="log", title="Tokens a second of each GPU")
    for axes in (steps, rates):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(size) for size in ranks])
        axes.set_xlabel(f"ranks ({measured_gpu})")
    rates.legend(*steps.get_legend_handles_labels(), fontsize="x-small", loc="center left", bbox_to_anchor=(0.0, 0.58))
    figure.tight_layout()
    # The picture carries its numbers, so that a test can tell whether it is of today's.
    numbers = {"Description": prediction_table(given, costs)}
    figure.savefig(path, metadata={**numbers, "Date": None} if path.suffix == ".svg" else numbers)
    pyplot.close(figure)
