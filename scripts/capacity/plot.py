"""A picture of the simulation: beside what was measured, and what it says of hundreds of replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.capacity.load import ARRIVALS, POISSON, Demand
from scripts.capacity.plan import check_table, simulate
from scripts.capacity.route import POLICIES
from scripts.capacity.speed import Speed

REPLICAS = 200
PROMPT, SHARED, BEGINNINGS, NEW = 512, 384, 1000, 64
LOADS = (0.5, 0.65, 0.8, 0.9)
SECONDS, WARM_S = 25.0, 5.0


def curves(speed: Speed, replicas: int = REPLICAS, seconds: float = SECONDS) -> dict[tuple[str, str], list[float]]:
    """p95 of the first token (ms) over LOADS for each policy and kind of arrivals."""
    most = replicas * speed.most_requests_per_s(PROMPT, NEW)
    found: dict[tuple[str, str], list[float]] = {}
    for arrivals in ARRIVALS:
        for load in LOADS:
            demand = Demand(most * load, PROMPT, NEW, arrivals, False, BEGINNINGS, SHARED)
            jobs = demand.jobs(seconds + WARM_S, seed=1)
            for policy in POLICIES:
                outcome = simulate(speed, replicas, jobs, policy, warm_s=WARM_S)
                found.setdefault((policy, arrivals), []).append(outcome.first_ms_p95)
    return found


def draw(speed: Speed, checked: list[dict[str, Any]], path: Path) -> None:
    """Writes two charts: simulated over measured milliseconds, and the first token's p95 over the load."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "capacity", "svg.fonttype": "none"})  # the same numbers are the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for servers, marker in ((1, "o"), (2, "s")):
        rows = [row for row in checked if row["servers"] == servers]
        label = f"{servers} server{'s' * (servers > 1)}"
        left.plot([row["measured"] for row in rows], [row["simulated"] for row in rows], marker, label=label)
    values = [row[key] for row in checked for key in ("measured", "simulated")] or [1.0, 10.0]
    left.plot([min(values), max(values)], [min(values), max(values)], color="0.6", zorder=-1)
    left.set(xlabel="measured ms", ylabel="simulated ms", title="First token and whole answer")
    left.legend()
    for (policy, arrivals), milliseconds in curves(speed).items():
        style = "-" if arrivals == POISSON else "--"
        color = f"C{POLICIES.index(policy)}"
        right.plot([100 * load for load in LOADS], milliseconds, style, color=color, label=f"{policy}, {arrivals}")
    title = f"{REPLICAS} replicas, {SHARED} of {PROMPT} prompt tokens shared"
    right.set(
        xlabel="load, % of what all could do without reuse", ylabel="first token, p95, ms", yscale="log", title=title
    )
    right.legend(fontsize="x-small")
    figure.tight_layout()
    # The picture carries the numbers it was checked against, so that a test can tell whether they are today's.
    numbers = {"Description": check_table(checked)}
    figure.savefig(path, metadata={**numbers, "Date": None} if path.suffix == ".svg" else numbers)
    pyplot.close(figure)
