"""What the metrics cost: steps a second of the engine with and without them, in one process, and microseconds a step.

Calls of one engine take turns, watched and not watched, and each call is compared with the one at the same place of the
next turn, which was the other way: a busy machine slows both alike. Beside that what the engine told in a turn is told
to `Metrics` alone, again and again: that time has no model in it, and says what a faster machine would pay. Random
weights; no HTTP, no text. On a CPU there is one thread and its CPU time counts, so what others take of a shared machine
does not. Covers counting and a scrape, not spans (`tracing`). Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import typer
from prometheus_client import generate_latest

from dsserve.core.request import GenerationRequest
from dsserve.engine.detokenizer import TextStream
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Load, Observer
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.token_budget import TokenBudget
from dsserve.kv.manager import KVManager
from dsserve.observability.metrics import Metrics
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.step_graphs import MOST_TOKENS
from scripts.bench.quantization import SHAPES, VOCABULARY, make_model, tune
from scripts.common.machine import cpu_model

PROMPT_TOKENS, NEW_TOKENS = 16, 65  # one step that reads the prompts, then sixteen calls
STEPS_A_CALL = 4
REPLAYS = 200
RESAMPLES = 2000
AIM = 0.02

Told = Callable[[Metrics], None]
Clock = Callable[[], float]


class Switch(Observer):
    """Tells `metrics` what the engine tells, while it is on, and notes it while `told` is a list."""

    def __init__(self, metrics: Metrics) -> None:
        self.on = False
        self.told: list[Told] | None = None
        self._metrics = metrics

    def stepped(self, step: Any) -> None:
        self._tell(lambda metrics: metrics.stepped(step))

    def called(self, load: Load) -> None:
        self._tell(lambda metrics: metrics.called(load))

    def ended(self, sequence: Any, outcome: Any) -> None:
        self._tell(lambda metrics: metrics.ended(sequence, outcome))

    def _tell(self, what: Told) -> None:
        if self.on:
            what(self._metrics)
        if self.told is not None:
            self.told.append(what)


class NoText(TextStream):
    """Makes no text, so that nothing but the step and the counting is timed."""

    def push(self, token: int, may_stop: bool = True) -> str:
        return ""

    def extend(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return ""


@dataclass
class Calls:
    """Seconds of each call of a turn, and whether it was watched."""

    seconds: list[float] = field(default_factory=list)
    watched: list[bool] = field(default_factory=list)


def turn(engine: Engine, switch: Switch, clock: Clock, rows: int, number: int) -> Calls:
    """Runs `rows` texts to their end; every other call is watched, which ones depends on `number`."""
    dice, calls = random.Random(number // 2), Calls()  # the same prompts for both turns of a pair
    for row in range(rows):
        prompt = tuple(dice.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS))
        engine.admit(GenerationRequest(f"{number}-{row}", prompt, NEW_TOKENS))
    while engine.running or engine.waiting:
        switch.on = (number + len(calls.seconds)) % 2 == 0
        started = clock()
        engine.run(STEPS_A_CALL)
        calls.seconds.append(clock() - started)
        calls.watched.append(switch.on)
    return calls


def compare(pairs: Sequence[tuple[Calls, Calls]]) -> dict[str, float]:
    """Steps a second both ways (median call of `STEPS_A_CALL` steps), and by what share the watched ones are slower.

    The share is the median over all places of a turn, of one pair each, with its 95 % interval.
    """
    ratios, seconds = list[float](), dict[bool, list[float]]({True: [], False: []})
    for one, other in pairs:
        for index, (first, second) in enumerate(zip(one.seconds, other.seconds, strict=True)):
            watched, bare = (first, second) if one.watched[index] else (second, first)
            ratios.append(watched / bare)
            if index:  # the first call reads prompts, in one step
                seconds[True].append(watched)
                seconds[False].append(bare)
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    with_metrics, without = (STEPS_A_CALL / statistics.median(seconds[on]) for on in (True, False))
    low, high = medians[RESAMPLES // 40], medians[-RESAMPLES // 40]
    found = {"steps_per_s": with_metrics, "steps_per_s_without": without, "slower": statistics.median(ratios) - 1}
    return found | {"slower_low": low - 1, "slower_high": high - 1}


def count_alone(engine: Engine, switch: Switch, clock: Clock, rows: int) -> float:
    """Microseconds a step that `Metrics` takes to count what the engine tells in one turn."""
    told: list[Told] = []
    switch.told = told
    turn(engine, switch, clock, rows, 0)
    switch.told = None
    metrics, steps = Metrics("bench", "1.0"), NEW_TOKENS
    started = clock()
    for _ in range(REPLAYS):
        for what in told:
            what(metrics)
    return (clock() - started) / REPLAYS / steps * 1e6


def measure(shape: str, kind: torch.dtype, device: torch.device, counts: Sequence[int], pairs: int) -> dict[str, Any]:
    """All numbers of rows in turn, and how long a scrape takes."""
    model = make_model(shape, kind, device)
    tune(model, device)
    rank, size = RankInfo(0, 0, 1, 1), KVSize.of_rows(max(counts), 128)
    runner = ModelRunner(model, size, rank, device)
    if device.type == "cuda":
        runner.capture_graphs(is_leader=False, tokens=MOST_TOKENS)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    metrics = Metrics("bench", "1.0")
    switch = Switch(metrics)
    kv = KVManager(size.pages, size.page_tokens, reuse=False)  # the same prompts come again
    budget = TokenBudget(max(counts) * PROMPT_TOKENS, max(counts) * PROMPT_TOKENS)  # all of them in one step
    scheduler = Scheduler(size.rows, kv, budget)
    engine = Engine(runner, rank, lambda _: NoText(None), frozenset(), scheduler, observer=switch)
    found: dict[str, Any] = {}
    for rows in counts:
        for number in range(2):  # the first calls of a shape are slower
            turn(engine, switch, clock, rows, number)
        turns = [turn(engine, switch, clock, rows, number) for number in range(2 * pairs)]
        numbers = compare(list(zip(turns[::2], turns[1::2], strict=True)))
        found[str(rows)] = numbers | {"microseconds_a_step": count_alone(engine, switch, clock, rows)}
    started = clock()
    for _ in range(20):
        generate_latest(metrics.registry)
    return {"rows": found, "scrape_ms": (clock() - started) / 20 * 1e3}


def table(*reports: dict[str, Any]) -> str:
    """One table of several models."""
    head = ("model", "rows", "steps/s without", "with", "slower by (95 %)", "counting a step")
    rows = [head, ("---",) * len(head)]
    for report in reports:
        for count, found in report["rows"].items():
            share = f"{found['slower']:.2%} ({found['slower_low']:.2%} to {found['slower_high']:.2%})"
            speeds = f"{found['steps_per_s_without']:.1f}", f"{found['steps_per_s']:.1f}"
            rows.append((report["shape"], count, *speeds, share, f"{found['microseconds_a_step']:.1f} µs"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(
    device: str = typer.Option("cpu", help="cpu or cuda"),
    shape: str = typer.Option("135m", help=", ".join(SHAPES)),
    dtype: str = typer.Option("bf16", help="bf16, fp16 or fp32"),
    rows: str = typer.Option("1,8,16", help="texts at the same time, with commas"),
    pairs: int = typer.Option(20, min=2, help="pairs of turns, 17 calls each"),
) -> None:
    """Measure and print the table; exit code 1 if the metrics cost more than 2 % of the steps."""
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(target) if device == "cuda" else f"{cpu_model()}, 1 thread, its CPU time"
    with torch.inference_mode():
        report = measure(shape, kind, target, [int(count) for count in rows.split(",")], pairs)
    report = {"device": name, "shape": shape, "dtype": dtype, "pairs": pairs, **report}
    typer.echo(f"{name}, torch {torch.__version__}, {dtype}; a scrape takes {report['scrape_ms']:.1f} ms\n")
    typer.echo(table(report))
    typer.echo(json.dumps(report))
    if any(found["slower"] > AIM for found in report["rows"].values()):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
