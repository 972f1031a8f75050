"""How many replicas and GPUs a load needs, and what its clients will see: a benchmark's figures, and a simulation.

`python -m scripts.capacity --bench FILE --rate 200 --prompt-tokens 512 --new-tokens 256`: the fewest replicas that keep
the goals, with `--spare` of them dead. `--check FILE`: the simulation beside what `scripts.reliability.failover`
measured. The answer holds for the model, GPU and TP size of the benchmark, as far as its two straight lines do
(`speed`).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from scripts.bench.open_load import poisson
from scripts.bench.report import percentile
from scripts.capacity import speed as capacity_speed
from scripts.capacity.load import ARRIVALS, POISSON, Demand, Job
from scripts.capacity.route import LEAST, POLICIES, ROUND_ROBIN, Router
from scripts.capacity.sim import Failure, Request, Simulation, failures
from scripts.capacity.speed import CapacityError, Speed
from scripts.common.console import extra, fail, say

# The balancer's DSSERVE_SERVER_MAX; round robin stands for a Service, which counts nothing.
SERVER_MAX = 32
SECONDS, WARM_S = 60.0, 10.0
MOST_REPLICAS = 2000


@dataclass(frozen=True)
class Goals:
    """What must hold for 95 of 100 requests, in milliseconds."""

    first_ms: float
    token_ms: float


@dataclass(frozen=True)
class Outcome:
    """What clients saw, without the first seconds. `busy`: part of the time that replicas compute."""

    replicas: int
    requests: int
    first_ms_median: float
    first_ms_p95: float
    token_ms_p95: float
    whole_ms_median: float
    whole_ms_p95: float
    cut: int
    busy: float

    def keeps(self, goals: Goals) -> bool:
        return self.first_ms_p95 <= goals.first_ms and self.token_ms_p95 <= goals.token_ms


def simulate(
    speed: Speed, replicas: int, jobs: list[Job], policy: str = LEAST, broken: list[Failure] | None = None,
    warm_s: float = WARM_S,
) -> Outcome:  # fmt: skip
    """One run of all jobs to their end."""
    most = speed.max_running + speed.max_waiting if policy == ROUND_ROBIN else SERVER_MAX
    run = Simulation(speed, replicas, Router(policy), most)
    requests = [request for request in run.run(jobs, broken or []) if request.job.at_s >= warm_s]
    ended = max((request.end_s or 0.0 for request in requests), default=0.0)
    busy = sum(replica.busy_ms for replica in run.replicas) / 1e3 / (replicas * ended) if ended else 0.0
    return describe(replicas, requests, busy)


def describe(replicas: int, requests: list[Request], busy: float) -> Outcome:
    """The outcome of requests that may have ended or not."""
    first = [request.first_ms for request in requests if request.first_ms is not None]
    whole = [request.whole_ms for request in requests if request.whole_ms is not None]
    gaps = [request.token_ms for request in requests if request.token_ms is not None]
    return Outcome(
        replicas=replicas,
        requests=len(requests),
        first_ms_median=percentile(first, 50),
        first_ms_p95=percentile(first, 95),
        token_ms_p95=percentile(gaps, 95),
        whole_ms_median=percentile(whole, 50),
        whole_ms_p95=percentile(whole, 95),
        cut=sum(request.cut for request in requests),
        busy=busy,
    )


def plan(speed: Speed, demand: Demand, goals: Goals, policy: str, seed: int = 1) -> Outcome:
    """The fewest replicas that keep the goals. Raises CapacityError if no number does."""
    jobs = demand.jobs(SECONDS + WARM_S, seed)
    alone = simulate(speed, 1, [Job(WARM_S, demand.prompt_tokens, demand.new_tokens, 0, 0)], policy)
    if not alone.keeps(goals):
        raise CapacityError(
            f"one request alone takes {alone.first_ms_median:.0f} ms to its first token and then "
            f"{alone.token_ms_p95:.1f} ms a token: no number of replicas is faster; raise the goals or TP"
        )
    most = speed.most_requests_per_s(demand.prompt_tokens, demand.new_tokens)
    low = max(1, int(demand.rate_per_s / most))  # fewer cannot even keep up
    high, found = low, simulate(speed, low, jobs, policy)
    while not found.keeps(goals):
        low, high = high + 1, high + max(1, high // 4)
        if high > MOST_REPLICAS:
            raise CapacityError(f"more than {MOST_REPLICAS} replicas: raise the goals or lower the rate")
        found = simulate(speed, high, jobs, policy)
    while low < high:
        middle = (low + high) // 2
        tried = simulate(speed, middle, jobs, policy)
        if tried.keeps(goals):
            high, found = middle, tried
        else:
            low = middle + 1
    return found


def check(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured and simulated figures of the same arrivals on one and two servers."""
    speed, setting, rows = capacity_speed.fit(report), report["setting"], []
    moments = poisson(setting["rate_per_s"], setting["seconds"], setting["seed"])
    jobs = [Job(at, setting["prompt_tokens"], setting["new_tokens"], 0, 0) for at in moments]
    for servers, measured in sorted(report["phases"].items()):
        found = simulate(speed, int(servers), jobs, LEAST, warm_s=0.0)
        rows += [
            {"servers": int(servers), "what": what, "measured": measured[key], "simulated": round(value, 1)}
            for what, key, value in (
                ("first token, median", "first_token_ms_median", found.first_ms_median),
                ("first token, p95", "first_token_ms_p95", found.first_ms_p95),
                ("whole answer, median", "whole_ms_median", found.whole_ms_median),
                ("whole answer, p95", "whole_ms_p95", found.whole_ms_p95),
            )
        ]
    return rows


def read(path: Path) -> dict[str, Any]:
    """A report: the whole file, or the last line of what a benchmark printed. Raises CapacityError."""
    text = path.read_text(encoding="utf-8").strip()
    for candidate in (text, text.splitlines()[-1] if text else ""):
        with contextlib.suppress(ValueError):
            return dict(json.loads(candidate))
    raise CapacityError(f"{path} holds no JSON: give what `make bench` or `make bench-failover` printed last")


def check_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| servers | ms | measured | simulated | error |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {item['servers']} | {item['what']} | {item['measured']:.0f} | {item['simulated']:.0f} | "
        f"{item['simulated'] / item['measured'] - 1:+.0%} |"
        for item in rows
    ]
    return "\n".join(lines)


def answer(speed: Speed, demand: Demand, goals: Goals, policy: str, ranks: int, spare: int, hours: float) -> str:
    """The plan as a table: as planned, with `spare` replicas more, and those while replicas die."""
    found = plan(speed, demand, goals, policy)
    jobs = demand.jobs(SECONDS + WARM_S, 1)
    total = found.replicas + spare
    broken = failures(total, SECONDS + WARM_S, hours, SECONDS, seed=1) if hours else []
    rows = [("keeps the goals", found), (f"with {spare} spare", simulate(speed, total, jobs, policy))]
    if hours:
        dying = "one replica dies" if len(broken) == 1 else f"{len(broken)} replicas die"
        rows.append((dying, simulate(speed, total, jobs, policy, broken)))
    lines = [
        "| | replicas | GPUs | first token, median / p95 | a token, p95 | whole answer, p95 | cut | computing |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row(name, item, ranks) for name, item in rows]
    return "\n".join(lines)


def row(name: str, item: Outcome, ranks: int) -> str:
    """One line of the plan's table."""
    cells = [name, str(item.replicas), str(item.replicas * ranks)]
    cells += [f"{item.first_ms_median:.0f} / {item.first_ms_p95:.0f} ms", f"{item.token_ms_p95:.1f} ms"]
    cells += [f"{item.whole_ms_p95 / 1e3:.1f} s", f"{item.cut} of {item.requests}", f"{item.busy:.0%}"]
    return f"| {' | '.join(cells)} |"


def main(
    bench: Path = typer.Option(
        None, exists=True, help="JSON of scripts.bench (its last line) or scripts.reliability.failover"
    ),
    rate: float = typer.Option(10.0, min=0.001, help="requests a second"),
    prompt_tokens: int = typer.Option(256, min=1),
    new_tokens: int = typer.Option(128, min=1, help="mean; lengths are exponential"),
    first_ms: float = typer.Option(500.0, help="goal: first token, p95"),
    token_ms: float = typer.Option(100.0, help="goal: between tokens, p95 over requests"),
    arrivals: str = typer.Option(POISSON, help=f"{' or '.join(ARRIVALS)}"),
    routing: str = typer.Option(LEAST, help=f"{', '.join(POLICIES)}"),
    beginnings: int = typer.Option(1, help="prompts begin with one of so many texts"),
    shared_tokens: int = typer.Option(0, help="of so many tokens, which are computed once where they are kept"),
    spare: int = typer.Option(1, min=0, help="replicas beyond what the goals need"),
    hours: float = typer.Option(0.0, help="a replica dies once in so many hours on average; 0 = never"),
    check_file: Path = typer.Option(
        None, "--check", exists=True, help="JSON of scripts.reliability.failover to compare with"
    ),
    plot: Path = typer.Option(None, help="also write this picture (.svg, .png); needs matplotlib"),
) -> None:
    """Print the plan, or the check, as Markdown tables."""
    if arrivals not in ARRIVALS or routing not in POLICIES:
        fail(f"arrivals: {', '.join(ARRIVALS)}; routing: {', '.join(POLICIES)}")
    if bench is None and check_file is None:
        fail("name a benchmark (--bench) or a fail-over run (--check)")
    try:
        checked = check(read(check_file)) if check_file else []
        if checked:
            typer.echo(check_table(checked))
        if bench:
            report = read(bench)
            speed, ranks = capacity_speed.fit(report), int(report["setting"].get("ranks", 1))
            demand = Demand(rate, prompt_tokens, new_tokens, arrivals, False, beginnings, shared_tokens)
            typer.echo(answer(speed, demand, Goals(first_ms, token_ms), routing, ranks, spare, hours))
            if plot:
                with extra("the picture"):
                    from scripts.capacity.plot import draw

                    draw(speed, checked, plot)
                    say(f"wrote {plot}")
    except (CapacityError, ValueError, KeyError) as error:
        fail(str(error))
