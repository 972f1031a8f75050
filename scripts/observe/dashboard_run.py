"""A load whose picture is worth a look: two servers behind HAProxy, a real Prometheus, and the dashboard drawn from it.

The load rises until both servers are full, falls, and one server is killed and added back meanwhile; half of the
prompts begin alike, and one request in twenty is refused. Prometheus runs with configs/prometheus, its alerts included.
Writes a picture (`dashboard_picture`) and prints one JSON line. Shows what the dashboard shows; figures that compare
anything are `failover`'s and `bench`'s.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from scripts.bench import open_load
from scripts.bench.client import BenchError, run_round
from scripts.bench.http import describe_machine, free_ports
from scripts.bench.open_load import Load
from scripts.bench.prompts import OPENINGS, cut_prompts
from scripts.common.console import exit_on_sigterm, extra, fail, say
from scripts.common.machine import MachineError
from scripts.common.paths import DEMO_MODEL, ROOT
from scripts.model.prepare import ModelError, prepare
from scripts.observe import dashboard_picture, prometheus
from scripts.observe.prometheus import Prometheus, PrometheusError
from scripts.pack.archive import PackageError
from scripts.reliability import balancer
from scripts.reliability.balancer import Balancer, BalancerError
from scripts.reliability.failover import DOWN_S, NAME, UP_TIMEOUT_S, Background, Pair, pair
from scripts.serve import server
from scripts.serve.run_dir import HOST

PICTURE = ROOT / "configs" / "measurements" / "dashboard.png"
# Parts of the run: how much of what one server can do is asked of both.
SHARES = (0.4, 0.8, 1.4, 2.4, 0.8, 0.3)
KILL_IN_PART = 1
CONCURRENT, NEW_TOKENS = 16, (16, 32, 64, 96)
SCRAPE_S = 10  # prometheus.yml's own
BEGINNING = " ".join(OPENINGS[:8])
AFTERWARDS_S = 30.0


def bodies(prompts: Sequence[str], seed: int = 1) -> list[dict[str, Any]]:
    """Completions of several lengths: every other prompt begins with the same 170 tokens, one in twenty is refused."""
    dice, found = random.Random(seed), list[dict[str, Any]]()
    for number in range(200):
        prompt = dice.choice(prompts)
        body = open_load.completion(f"{BEGINNING} {prompt}" if number % 2 else prompt, dice.choice(NEW_TOKENS))
        found.append(body if number % 20 else body | {"temperature": -1})
    return found


def arrivals(rates_per_s: Sequence[float], part_s: float, seed: int = 1) -> list[float]:
    """Moments of random arrivals at one rate after the other."""
    return [
        part * part_s + moment
        for part, rate in enumerate(rates_per_s)
        for moment in open_load.poisson(rate, part_s, seed + part)
    ]


def kill_and_add_back(both: Pair, front: Balancer) -> None:
    """What happens to s2 in the middle of the load."""
    say(f"s2 is killed: {both.kill('s2')} processes")
    front.wait_until("s2", False, 30)
    time.sleep(DOWN_S)
    say(f"s2 is ready again after {both.start('s2'):.1f} s")


def send(front: Balancer, load: Load, both: Pair, kill_at_s: float) -> dict[str, Any]:
    """The whole load, s2's death in it; returns how many requests ended how, and what refused ones were told."""
    background = Background(front, load)
    accident = threading.Timer(kill_at_s, kill_and_add_back, (both, front))
    accident.start()
    try:
        background.join()
    finally:
        accident.cancel()
        accident.join()
    told = Counter(answer.detail for answer in background.answers if answer.outcome == open_load.REFUSED)
    return {**open_load.count(background.answers), "told": dict(told)}


def alerts(target: Prometheus, start: float, end: float) -> list[str]:
    """Names of the alerts that were pending or fired."""
    found = target.query_range("count by (alertname, alertstate) (ALERTS)", start, end, SCRAPE_S)
    return sorted(f"{series.labels['alertname']} {series.labels['alertstate']}" for series in found)


def run(model: str, part_s: float, picture: Path) -> dict[str, Any]:
    """Everything in turn; returns the report. Raises the errors of its parts."""
    from transformers import AutoTokenizer

    model_path = prepare(model)
    prompts = cut_prompts(AutoTokenizer.from_pretrained(model_path))
    with tempfile.TemporaryDirectory(prefix="dsserve-dashboard-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        both = stack.enter_context(pair(model_path, "bf16", folder))
        ports = both.runs["s1"][1].inference
        for _ in range(2):  # the first one warms up
            alone = run_round(HOST, ports, f"/predictions/{NAME}", prompts[:CONCURRENT], 32).tokens_per_s
        rates = [round(share * alone / (sum(NEW_TOKENS) / len(NEW_TOKENS)), 2) for share in SHARES]
        config = prometheus.configuration([ports for _, ports in both.runs.values()])
        target = stack.enter_context(prometheus.running(folder / "prometheus", free_ports().inference, config))
        front = stack.enter_context(balancer.running(folder, free_ports().inference, NAME, both.addresses()))
        for server_name in both.runs:
            front.wait_until(server_name, True, UP_TIMEOUT_S)
        start = time.time()
        say(f"{', '.join(map(str, rates))} requests/s, {part_s:.0f} s each ...")
        load = Load(arrivals(rates, part_s), bodies(prompts))
        ended = send(front, load, both, (KILL_IN_PART + 0.5) * part_s)
        time.sleep(AFTERWARDS_S)
        end = time.time()
        empty: list[str] | None = None
        with extra("the picture"):
            empty = dashboard_picture.draw(target, picture, start, end, SCRAPE_S, SCRAPE_S)
        report = {"machine": describe_machine(), "one_server_tokens_per_s": round(alone, 1), "part_s": part_s}
        report |= {"requests_per_s": rates, "requests": ended, "alerts": alerts(target, start, end)}
        return report | {"seconds": round(end - start), "panels_without_data": empty}


def main(
    model: str = typer.Option(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id"),
    part_seconds: float = typer.Option(75, min=10, help=f"length of each of the {len(SHARES)} parts of the load"),
    picture: Path = typer.Option(PICTURE, help="where the picture goes (PNG)"),
) -> None:
    """Run the load, draw the dashboard, print one JSON line."""
    exit_on_sigterm()
    try:
        report = run(model, part_seconds, picture)
    except (
        BenchError, BalancerError, PackageError, MachineError, ModelError, PrometheusError, server.ServerError
    ) as error:  # fmt: skip
        fail(str(error))
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
