"""Two servers behind HAProxy: the same load on one and on two of them, then one is killed under load and added back.

Both run on this machine, one rank and one thread each (CPU), on ports of their own. Counts what clients saw: requests
that were being answered by the killed server are cut, all others must be answered in full. The last line is one JSON
document; `scripts.capacity` checks its simulation against it. Not covered: hosts that vanish without closing their
connections (HAProxy's `timeout server` and its health check then decide). In fp32 every text is compared with
transformers' own; in bf16 it may differ from run to run, and only the number of tokens is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import typer

from scripts.bench import open_load
from scripts.bench.client import BenchError, run_round
from scripts.bench.generate import load
from scripts.bench.http import describe_machine, free_ports
from scripts.bench.open_load import Answer, Load
from scripts.bench.prompts import PROMPT_TOKENS, cut_prompts
from scripts.bench.report import http_numbers
from scripts.common.console import exit_on_sigterm, extra, fail, print_report, say
from scripts.common.machine import MachineError
from scripts.common.paths import DEMO_MODEL
from scripts.model.prepare import ModelError, prepare
from scripts.pack.archive import Choice, PackageError, package
from scripts.reliability import balancer, failover_report
from scripts.reliability.balancer import Balancer, BalancerError
from scripts.serve import processes, server
from scripts.serve.run_dir import HOST, Ports, RunDir

NAME = "failover"
CONCURRENT = (1, 2, 4, 8, 16)
PATH = "/v1/completions"
UP_TIMEOUT_S = 120.0
# The load goes on after the server is back, so that it is seen to serve.
AFTERWARDS_S = 15.0
# No server could be brought back in this time on the slowest machine seen.
LONGEST_OUTAGE_S = 180.0
DOWN_S = 5.0
OF_ONE_SERVER = 0.6  # of its tokens/s with as many requests as it runs at a time
BURST, BURST_BEFORE_S = 12, 0.03


@dataclass
class Pair:
    """Two servers of one archive. `runs` by HAProxy's names for them."""

    folder: Path
    archive: Path
    runs: dict[str, tuple[RunDir, Ports]] = field(default_factory=dict)

    def start(self, name: str) -> float:
        """Start a server (again) and return after how many seconds it was ready. Raises ServerError, MachineError."""
        run, ports = self.runs.setdefault(name, (RunDir(self.folder / name), free_ports()))
        server.stop(run)  # what a kill has left: the record, the temporary folder
        started = time.monotonic()
        record = server.start(run, NAME, self.archive, ports)
        server.wait_until_ready(run, record, lambda stage: None)
        return time.monotonic() - started

    def kill(self, name: str) -> int:
        """SIGKILL to everything of a server at once, as if its machine was switched off. Returns how many processes."""
        found = processes.find_marked(self.runs[name][0].path)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return len(found)

    def addresses(self) -> list[str]:
        return [f"{HOST}:{ports.inference}" for _, ports in self.runs.values()]

    def stop(self) -> None:
        for run, _ in self.runs.values():
            server.stop(run)


@contextlib.contextmanager
def pair(model_path: str, dtype: str, folder: Path) -> Iterator[Pair]:
    """Two ready servers, stopped at the end. Raises ServerError, MachineError, PackageError."""
    limits = {"num_threads": 1, "max_model_len": 1024}
    choice = Choice("1", "cpu", dtype)
    both = Pair(folder, package(NAME, model_path, choice, model_store=folder / "store", handler=limits))
    try:
        for name in ("s1", "s2"):
            say(f"{name} ready after {both.start(name):.1f} s")
        yield both
    finally:
        both.stop()


class Background(threading.Thread):
    """A load that is sent while something else happens."""

    def __init__(self, target: Balancer, load: Load) -> None:
        super().__init__(name="load", daemon=True)
        self.answers: list[Answer] = []
        self.began = time.monotonic()
        self._target, self._load, self._over = target, load, threading.Event()
        self.start()

    def run(self) -> None:
        self.answers = send(self._target, self._load, self._over.is_set)

    def end(self) -> list[Answer]:
        """Nothing more is sent; returns when all that was sent has ended."""
        self._over.set()
        self.join()
        return self.answers


def send(target: Balancer, load: Load, is_over: Callable[[], bool] = lambda: False) -> list[Answer]:
    return asyncio.run(open_load.send(HOST, target.port, PATH, load, is_over))


def measure_alone(ports: Ports, prompts: list[str], tokens: int) -> dict[str, dict[str, float]]:
    """One server's speed with several requests at once, as `bench` measures it: what the simulation is fitted to."""
    path, rounds = f"/predictions/{NAME}", {}
    run_round(HOST, ports.inference, path, prompts[:2], tokens)
    for concurrent in CONCURRENT:
        rounds[str(concurrent)] = [
            run_round(HOST, ports.inference, path, prompts[:concurrent], tokens) for _ in range(3)
        ]
    return http_numbers(rounds)


def right_texts(model_path: str, prompts: list[str], tokens: int) -> list[str]:
    """transformers' own texts in fp32, greedy, each prompt alone."""
    import torch

    tokenizer, network = load(model_path, "fp32", "cpu")
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = network.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def kill_and_add_back(both: Pair, target: Balancer, steady: Load, calm_s: float) -> dict[str, Any]:
    """The same load goes on while s2 is killed, is down for a while, starts and serves again."""
    background = Background(target, steady)
    time.sleep(calm_s)
    open_there = int(target.servers()["s2"]["scur"])
    killed_at = time.monotonic()
    killed = both.kill("s2")
    target.wait_until("s2", False, 30)
    down_after = time.monotonic() - killed_at
    served_before = int(target.servers()["s2"]["stot"])
    time.sleep(DOWN_S)
    started_at = time.monotonic()
    load_s = both.start("s2")
    target.wait_until("s2", True, 30)
    up_at = time.monotonic()
    time.sleep(AFTERWARDS_S)
    stats = target.servers()
    return {
        "answers": background.end(),
        "processes_killed": killed,
        "killed_at_s": round(killed_at - background.began, 2),
        "open_requests_at_kill": open_there,
        "taken_out_after_s": round(down_after, 2),
        "load_s": round(load_s, 1),
        "back_after_start_s": round(up_at - started_at, 1),
        "served_after_return": int(stats["s2"]["stot"]) - served_before,
        "retries": sum(int(row["wretr"]) for row in stats.values()),
        "sent_elsewhere": sum(int(row["wredis"]) for row in stats.values()),
    }


def failover(model: str, dtype: str, rate_per_s: float | None, seconds: float, tokens: int) -> dict[str, Any]:
    """Everything in turn; returns the report. Raises the errors of its parts."""
    from transformers import AutoTokenizer

    model_path = prepare(model)
    prompts = cut_prompts(AutoTokenizer.from_pretrained(model_path))
    texts = right_texts(model_path, prompts, tokens) if dtype == "fp32" else None
    with tempfile.TemporaryDirectory(prefix="dsserve-failover-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        both = stack.enter_context(pair(model_path, dtype, folder))
        alone = measure_alone(both.runs["s1"][1], prompts, tokens)
        rate = rate_per_s or round(OF_ONE_SERVER * alone[str(CONCURRENT[-1])]["tokens_per_s"] / tokens, 2)
        front = stack.enter_context(balancer.running(folder, free_ports().inference, NAME, both.addresses()))
        for server_name in both.runs:
            front.wait_until(server_name, True, UP_TIMEOUT_S)
        bodies = [open_load.completion(prompt, tokens) for prompt in prompts]
        calm = Load(open_load.poisson(rate, seconds, seed=1), bodies, texts)
        phases = {}
        for servers in (2, 1):
            say(f"{rate} requests/s for {seconds:.0f} s on {servers} server(s) ...")
            front.set_enabled("s2", servers == 2)
            phases[str(servers)] = failover_report.phase(send(front, calm))
        front.set_enabled("s2", True)
        say("the same load; s2 is killed and added back ...")
        moments = open_load.poisson(rate, seconds + LONGEST_OUTAGE_S, seed=2)
        # Some requests have just come when the server dies, and none of them has its first token.
        moments += [seconds / 2 - BURST_BEFORE_S] * BURST
        steady = Load(sorted(moments), bodies, texts)
        setting = {"model": Path(model).name, "dtype": dtype, "prompt_tokens": PROMPT_TOKENS, "new_tokens": tokens}
        setting |= {"rate_per_s": rate, "seconds": seconds, "seed": 1, "server": "1 rank, 1 thread, max_running 16"}
        report = {"machine": describe_machine(), "setting": setting, "alone": alone, "phases": phases}
        try:
            found = kill_and_add_back(both, front, steady, seconds / 2)
        except BaseException:
            typer.echo(json.dumps(report))  # what came before was measured all the same
            raise
    return report | {"failover": failover_report.kill(found)}


def main(
    model: str = typer.Option(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id"),
    dtype: str = typer.Option("bf16", help="bf16, fp16 or fp32"),
    rate: float = typer.Option(None, help="requests a second; left out: 0.6 of what one server can do"),
    seconds: float = typer.Option(60, min=10, help="length of a phase"),
    tokens: int = typer.Option(32, min=2, help="new tokens of each request"),
    output: Path = typer.Option(None, help="write the report here too"),
) -> None:
    """Measure, print a table, then one JSON line; exit code 1 if a request was lost that no server had begun."""
    exit_on_sigterm()
    try:
        report = failover(model, dtype, rate, seconds, tokens)
    except (BenchError, BalancerError, PackageError, MachineError, ModelError, server.ServerError) as error:
        fail(str(error))
    print_report(failover_report.table, report)
    if output:
        with extra(str(output)):
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lost = failover_report.failures(report)
    if lost:
        fail(f"requests failed that no server had begun to answer: {lost}")


if __name__ == "__main__":
    typer.run(main)
