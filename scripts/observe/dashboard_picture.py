"""The Grafana dashboard as a picture, without Grafana: its own panels and queries, asked of a Prometheus, drawn here.

Reads configs/grafana/dsserve.json and nothing of `dashboard`, so that what is drawn is what Grafana would be given.
Fills the variables as Grafana does (all models, all servers) and places panels by their grid. Knows time series only.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.observe.dashboard import COLUMNS, FILE
from scripts.observe.prometheus import Prometheus, Series

WIDTH_IN, LINE_IN, DPI = 15.0, 0.26, 72
MARGIN = 0.006
PALETTE = 256
UNITS = {"s": ", s", "reqps": ", /s", "percentunit": ", %", "bytes": ", GiB", "short": "", "none": ""}
FACTORS = {"percentunit": 100.0, "bytes": 2.0**-30}


def read_panels(file: Path = FILE) -> list[dict[str, Any]]:
    """Rows and panels in Grafana's JSON."""
    return list(json.loads(file.read_text(encoding="utf-8"))["panels"])


def fill(promql: str, step_s: float, scrape_s: float) -> str:
    """A panel's query with everything chosen, and Grafana's own window for rates: four scrapes, or a step and one."""
    window = math.ceil(max(4 * scrape_s, step_s + scrape_s))
    return re.sub(r"\$(model_name|instance)\b", ".*", promql.replace("$__rate_interval", f"{window}s"))


def name(legend: str, labels: Mapping[str, str]) -> str:
    """A series' name: Grafana puts labels for `{{label}}`."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)


def ask(
    target: Prometheus, panel: Mapping[str, Any], start: float, end: float, step_s: float, scrape_s: float
) -> list[tuple[str, Series]]:
    """All series of a panel with their names, in the order of its queries."""
    found = []
    for query in panel["targets"]:
        for series in target.query_range(fill(query["expr"], step_s, scrape_s), start, end, step_s):
            found.append((name(query["legendFormat"], series.labels), series))
    return found


def draw(target: Prometheus, path: Path, start: float, end: float, step_s: float, scrape_s: float) -> list[str]:
    """Writes the picture of the time from `start` to `end` and returns the titles of panels that had no data."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    panels = read_panels()
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(WIDTH_IN, lines * LINE_IN), dpi=DPI)
    empty = []
    for panel in panels:
        left, top, width, height = (panel["gridPos"][key] for key in "xywh")
        x, y = left / COLUMNS, 1 - top / lines
        if panel["type"] == "row":
            figure.text(x + MARGIN, y - 0.7 / lines, panel["title"], weight="bold", fontsize=12)
            continue
        place = (x + 0.035, y - (height - 1.9) / lines, width / COLUMNS - 0.045, (height - 3) / lines)
        series = ask(target, panel, start, end, step_s, scrape_s)
        plot(figure.add_axes(place), panel, series, start, end, step_s)
        if not series:
            empty.append(panel["title"])
    titles = "; ".join(panel["title"] for panel in panels)
    save(figure, path, titles)
    pyplot.close(figure)
    return empty


def save(figure: Any, path: Path, description: str) -> None:
    """As PNG with a palette, half of the size; the description tells which panels it shows."""
    from PIL import Image, PngImagePlugin

    buffer, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(buffer)
    notes.add_text("Description", description)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE).save(path, "png", optimize=True, pnginfo=notes)


def with_gaps(samples: Sequence[tuple[float, float]], step_s: float) -> list[tuple[float, float]]:
    """The samples, and no number where some are missing, so that no line is drawn over it."""
    found = list(samples[:1])
    for at, value in samples[1:]:
        if at - found[-1][0] > 1.5 * step_s:
            found.append((found[-1][0] + step_s, math.nan))
        found.append((at, value))
    return found


def plot(
    axes: Any, panel: Mapping[str, Any], found: Sequence[tuple[str, Series]], start: float, end: float, step_s: float
) -> None:
    """One chart: minutes since `start`, values in the panel's unit; stacked where the panel is."""
    defaults = panel["fieldConfig"]["defaults"]
    factor = FACTORS.get(defaults["unit"], 1.0)
    axes.set_title(panel["title"] + UNITS[defaults["unit"]], loc="left", fontsize=10)
    axes.set_xlim(0, (end - start) / 60)
    axes.xaxis.set_major_formatter("{x:g} min")
    is_stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    lines = []
    for label, series in found:
        samples = with_gaps(series.samples, step_s)
        lines.append((label, [(at - start) / 60 for at, _ in samples], [value * factor for _, value in samples]))
    if is_stacked and lines:
        stack(axes, lines)
    else:
        for label, minutes, values in lines:
            axes.plot(minutes, values, linewidth=1.1, label=label)
    if not lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="0.5")
    most = 100 if "max" in defaults else max([0.0, *(v for _, _, values in lines for v in values if v == v)]) * 1.1
    axes.set_ylim(0, axes.get_ylim()[1] if is_stacked else most or 1)
    axes.grid(alpha=0.3, linewidth=0.5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=min(len(lines), 5), frameon=False, fontsize=8
        )


def stack(axes: Any, lines: Sequence[tuple[str, list[float], list[float]]]) -> None:
    """Areas on top of each other; a series that begins late, or has no number somewhere, counts 0 there."""
    minutes = sorted({at for _, moments, _ in lines for at in moments})
    heights = []
    for _, moments, values in lines:
        known = dict(zip(moments, values, strict=True))
        heights.append([0.0 if math.isnan(known.get(at, 0.0)) else known.get(at, 0.0) for at in minutes])
    axes.stackplot(minutes, heights, labels=[label for label, _, _ in lines], alpha=0.6)
