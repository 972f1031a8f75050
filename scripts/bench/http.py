"""Measure tokens per second and response times through HTTP, beside plain transformers on the same cores.

Starts and stops a server of its own on free ports (or uses the one at --url). `generate` runs before and after, while
no server works, so that a machine that got slower meanwhile shows. The last line is one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from scripts.bench import report as bench_report
from scripts.bench.client import BenchError, Round, run_round
from scripts.bench.prompts import PROMPT_TOKENS, cut_prompts
from scripts.common.console import exit_on_sigterm, extra, fail, print_report, say
from scripts.common.machine import AUTO, MachineError, count_cores, cpu_model
from scripts.common.paths import DEMO_MODEL, ROOT
from scripts.model.prepare import ModelError, prepare
from scripts.pack.archive import DS_CONFIG, Choice, PackageError, package
from scripts.serve import server
from scripts.serve.run_dir import HOST, Ports, RunDir

NAME = "bench"
CONCURRENT = (1, 4, 8, 16)
NEW_TOKENS = 64
# Every sampling parameter at once; nothing ends a text before its length.
SAMPLING = {
    "temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02, "typical_p": 0.95, "repetition_penalty": 1.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1.0}, "seed": 1,
    "min_tokens": NEW_TOKENS - 1, "stop": ["never to be seen"],
}  # fmt: skip
BASELINE_REPEATS = 3
PACKAGES = ("torch", "transformers", "deepspeed", "torchserve")
PORT_RANGE = range(20000, 30000, 10)


def free_ports() -> Ports:
    """A block of ports that nobody uses at the moment. Raises BenchError."""
    for first in random.sample(PORT_RANGE, k=50):
        if not Ports(first).taken():
            return Ports(first)
    raise BenchError("no free block of ports found: stop some servers")


@contextlib.contextmanager
def own_server(archive: Path) -> Iterator[str]:
    """Serve `archive` while the block runs; yields the URL of the model. Raises ServerError, MachineError."""
    ports = free_ports()
    run = RunDir(ROOT / "run" / f"{NAME}-{ports.inference}")
    try:
        record = server.start(run, NAME, archive, ports)
        server.wait_until_ready(run, record, on_stage=lambda stage: None)
        yield f"http://{HOST}:{ports.inference}/predictions/{NAME}"
    finally:
        server.stop(run)


def measure_generate(model_path: str, dtype: str, device: str) -> bench_report.Rates:
    """Tokens per second of transformers for each batch size, measured in a process of its own. Raises BenchError."""
    options = {"model": model_path, "dtype": dtype, "device": device, "threads": count_cores()}
    options |= {"new-tokens": NEW_TOKENS, "repeats": BASELINE_REPEATS}
    command = [sys.executable, "-m", "scripts.bench.generate"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"transformers' generate failed:\n{done.stderr.strip()[-2000:]}")
    return {int(batch): rates for batch, rates in json.loads(done.stdout.splitlines()[-1]).items()}


def measure_http(url: str, prompts: list[str], repeats: int) -> dict[str, list[Round]]:
    """`repeats` rounds for each number of concurrent requests and for sampled ones, in turn, after one that is not
    counted."""
    address = urlsplit(url)
    cases: dict[str, tuple[int, dict[str, Any]]] = {str(concurrent): (concurrent, {}) for concurrent in CONCURRENT}
    cases[bench_report.SAMPLED] = (max(CONCURRENT), SAMPLING)
    rounds: dict[str, list[Round]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, (concurrent, sampling) in cases.items():
            batch, host, port = prompts[:concurrent], address.hostname or HOST, address.port or 80
            result = run_round(host, port, address.path, batch, NEW_TOKENS, sampling)
            if repeat > 0:
                rounds[name].append(result)
    return rounds


def describe_machine() -> dict[str, Any]:
    versions = {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in PACKAGES}}
    return {"cpu": cpu_model(), "cores": count_cores(), "versions": versions}


def read_setting(archive: Path, model: str, repeats: int) -> dict[str, Any]:
    """What is measured, as the archive says it."""
    config = server.read_archive(archive)
    with zipfile.ZipFile(archive) as file:
        dtype = json.loads(file.read(DS_CONFIG))["dtype"]
    ranks, device = config["torchrun"]["nproc-per-node"], config["deviceType"]
    setting = {"model": Path(model).name, "ranks": ranks, "device": device, "dtype": dtype, "repeats": repeats}
    return setting | {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}


def bench(model: str, choice: Choice, url: str | None, repeats: int) -> dict[str, Any]:
    """Run everything and return the report. Raises the errors of its parts."""
    from transformers import AutoTokenizer

    model_path = prepare(model)
    prompts = cut_prompts(AutoTokenizer.from_pretrained(model_path))
    with tempfile.TemporaryDirectory(prefix="dsserve-bench-") as folder:
        archive = package(NAME, model_path, choice, model_store=Path(folder))
        setting = read_setting(archive, model, repeats)
        say("transformers' generate, first time ...")
        before = measure_generate(model_path, setting["dtype"], setting["device"])
        with contextlib.nullcontext(url) if url else own_server(archive) as target:
            say(f"{repeats} rounds of {', '.join(map(str, CONCURRENT))} concurrent requests ...")
            rounds = measure_http(str(target), prompts, repeats)
        say("transformers' generate, second time ...")
        after: bench_report.Rates = {}
        with extra("the second time"):
            after = measure_generate(model_path, setting["dtype"], setting["device"])
    http, generate = bench_report.http_numbers(rounds), bench_report.generate_numbers(before, after)
    report: dict[str, Any] = {"machine": describe_machine(), "setting": setting, "http": http, "generate": generate}
    with extra("the aims"):
        report |= {"aims": bench_report.compare(http, generate)}
    return report


def main(
    model: str = typer.Option(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id"),
    tp: str = typer.Option(AUTO, help="number of ranks"),
    device: str = typer.Option(AUTO, help="auto, cpu or gpu"),
    dtype: str = typer.Option(AUTO, help="bf16, fp16 or fp32"),
    url: str | None = typer.Option(None, help="measure this model, e.g. http://127.0.0.1:8080/predictions/smollm2"),
    repeats: int = typer.Option(5, min=3, help="rounds for each number of concurrent requests"),
) -> None:
    """Measure and print a table, then one JSON line."""
    exit_on_sigterm()
    try:
        report = bench(model, Choice(tp, device, dtype), url, repeats)
    except (BenchError, PackageError, MachineError, ModelError, server.ServerError, ValueError) as error:
        fail(str(error))
    print_report(bench_report.table, report)
