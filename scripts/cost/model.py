"""Prints a cost model of decode steps: its costs, its error on what was measured, and what it predicts for more ranks.

The model is in `terms`, the fit in `fit`. Measures nothing.
"""

from __future__ import annotations

from pathlib import Path

import typer

from scripts.common.console import extra, fail, say
from scripts.cost.fit import fit, read_points
from scripts.cost.report import error_table, other_table, prediction_table, summary_table
from scripts.cost.terms import load

MEASUREMENTS = Path(__file__).resolve().parents[2] / "configs" / "measurements" / "llama-6.7b.json"


app = typer.Typer(add_completion=False)


@app.command()
def main(
    measurements: Path = typer.Option(MEASUREMENTS, help="what was measured, and the machine's bandwidths"),
    plot: Path | None = typer.Option(None, help="also write this picture (.svg, .png); needs matplotlib"),
) -> None:
    """Print the model's costs, its error on every measured step, and what it predicts."""
    try:
        given = load(measurements)
    except (OSError, ValueError) as error:
        fail(f"{measurements} holds no measurements: {error}")
    points = read_points(given)
    costs = fit(given, points)
    say(f"{given.what}\n{given.source}")
    tables = [error_table(given, points, costs), summary_table(given, points, costs), prediction_table(given, costs)]
    print("\n\n".join(tables))
    with extra("other shapes"):
        print("\n" + other_table(given, costs))
    if plot is not None:
        with extra("the picture"):
            from scripts.cost.plot import draw

            draw(given, points, costs, plot)
            say(f"wrote {plot}")
