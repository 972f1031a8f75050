"""Measure a model of random weights at engine level, through HTTP, and beside transformers, in parts of a few minutes.

Needs no hub: the weights are drawn, in the shape of a known model. Each part runs in processes of its own, ends after
its time, and is merged into one JSON file, so that a run can be spread over several commands. Prints a table; the last
line is that JSON document. `bench` measures the served demo model; this one is about a machine and its ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from scripts.bench.client import BenchError
from scripts.bench.gpu import http as bench_gpu_http
from scripts.bench.gpu.report import WAYS, add_floor, table
from scripts.bench.http import PACKAGES
from scripts.common.console import exit_on_sigterm, fail, print_report, say
from scripts.common.machine import AUTO, MachineError, count_cores, cpu_model, resolve_device, resolve_dtype, resolve_tp
from scripts.common.paths import ROOT
from scripts.model.random import SHAPES, prepare_random
from scripts.pack.archive import Choice, PackageError
from scripts.serve import server

PART_S = 480.0
HTTP_END_S = 30.0  # of a part's time, to end the last round and the server
GRACE_S = 10.0
ONE_DEVICE = ("generate", "batching")


class Bench:
    """One shape on one machine, and the file in which its parts are merged.

    Args:
        setting: what is measured; a file of another setting is not added to.
    """

    def __init__(self, setting: dict[str, Any], model: Path, out: Path) -> None:
        self._setting = setting
        self._model = model
        self._out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {"machine": describe_machine(setting["device"]), "setting": setting, "parts": {}}
        if out.is_file():
            before = json.loads(out.read_text(encoding="utf-8"))
            if before["setting"] != setting:
                raise BenchError(f"{out} holds results of another setting: name another file with --out, or remove it")
            self.report["parts"] = before["parts"]

    def run(self, way: str, prompt: int, batches: list[int], seconds: float) -> None:
        """Measures one part and merges it into the file, cases that were there before included."""
        started = time.monotonic()
        try:
            part = self._http(prompt, batches, seconds) if way == "http" else self._ranks(way, prompt, batches, seconds)
        except (BenchError, PackageError, server.ServerError) as error:
            part = {"cases": {}, "skipped": {"all": str(error)}}
        part["took_s"] = round(time.monotonic() - started, 1)
        parts = self.report["parts"].setdefault(way, {})
        before = parts.get(str(prompt), {})
        part["cases"] = {**before.get("cases", {}), **part["cases"]}
        parts[str(prompt)] = part
        if way == "http":
            self._floor_of_engine(prompt)
        self._out.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def _floor_of_engine(self, prompt: int) -> None:
        """A server is not asked for its bytes: they are those of the engine part, where that was measured."""
        engine, part = (self.report["parts"].get(way, {}).get(str(prompt), {}) for way in ("engine", "http"))
        for name, numbers in part["cases"].items():
            floor = engine.get("cases", {}).get(name, {}).get("floor_ms")
            if floor is not None:
                numbers |= {"floor_ms": floor, "of_floor": round(floor / numbers["step_ms"], 3)}

    def _http(self, prompt: int, batches: list[int], seconds: float) -> dict[str, Any]:
        setting = self._setting
        choice = Choice(str(setting["tp"]), setting["device"], setting["dtype"])
        vocabulary = SHAPES[setting["shape"]][1]["vocab_size"]
        deadline = time.monotonic() + seconds - HTTP_END_S
        numbers = (setting["new_tokens"], setting["repeats"])
        # A batch for which the engine has not the pages would wait in the server, too, which does not say so.
        refused = self.report["parts"].get("engine", {}).get(str(prompt), {}).get("skipped", {})
        skipped = {str(batch): refused[str(batch)] for batch in batches if str(batch) in refused}
        batches = [batch for batch in batches if str(batch) not in skipped]
        if not batches:
            return {"cases": {}, "skipped": skipped}
        part = bench_gpu_http.measure_http(self._model, choice, vocabulary, prompt, batches, *numbers, deadline)
        return part | {"skipped": skipped | part["skipped"]}

    def _ranks(self, way: str, prompt: int, batches: list[int], seconds: float) -> dict[str, Any]:
        """One part in processes of its own, ended with what it has when its time is over."""
        setting = self._setting
        spec = {
            key: setting[key] for key in ("device", "dtype", "new_tokens", "repeats", "prefill_tokens", "chunk_tokens")
        }
        spec |= {"part": way, "model": str(self._model), "prompt": prompt, "batches": batches}
        ranks = 1 if way in ONE_DEVICE else setting["tp"]
        with tempfile.TemporaryDirectory(prefix="dsserve-bench-") as scratch:
            folder = Path(scratch)
            (folder / "spec").write_text(json.dumps(spec), encoding="utf-8")
            error = run_ranks(ranks, folder, setting["device"], seconds)
            if error:
                error += f" (the ranks' log: {self._keep_log(folder / 'log', way, prompt)})"
            files = [folder / f"{rank}.json" for rank in range(ranks)]
            found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if len(found) < ranks or any("bytes" not in rank for rank in found):
            raise BenchError(error or "a rank left no results")
        part = {"cases": found[0]["cases"], "skipped": found[0]["skipped"]}
        if error:
            part["skipped"]["all"] = f"the rest: {error}"
        add_floor(part, found, prompt, setting["new_tokens"])
        peaks = [rank["memory"]["peak"] / 2**30 for rank in found]
        part |= {"bandwidth": [rank["bandwidth"] for rank in found], "bytes": [rank["bytes"] for rank in found]}
        return part | {"peak_gib": round(max(peaks), 2), "load_s": found[0]["load_s"]}

    def _keep_log(self, log: Path, way: str, prompt: int) -> Path:
        """A failed part's log lies beside the results; the report has one line of it."""
        return Path(shutil.copyfile(log, self._out.with_suffix(f".{way}-{prompt}.log")))


def run_ranks(ranks: int, folder: Path, device: str, seconds: float) -> str:
    """Runs the ranks to their end or for so long; returns what went wrong, if anything."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
    command += ["-m", "scripts.bench.gpu.rank", str(folder / "spec"), str(folder)]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    # A PYTHON that was named does not have the package installed.
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "handlers"), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environ["DS_ACCELERATOR"] = "cpu"
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:.0f} s"
        finally:
            _end(process)
        log.seek(0)
        return "" if process.returncode == 0 else why(log.read())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends torchrun, if it still runs; its ranks end with it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def why(log: str) -> str:
    """The line of a failed run that says most."""
    errors = [line for line in re.findall(r"\w*Error: .+", log) if "ChildFailedError" not in line]
    killed = re.findall(r"Signal \d+ \(\w+\) received", log)
    return [log.strip()[-300:], *killed, *errors][-1][:500]


def describe_machine(device: str) -> dict[str, Any]:
    """The device's name, how many there are, and versions."""
    import torch

    on_gpu = device == "gpu"
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if on_gpu else cpu_model()
    versions = {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in PACKAGES}}
    return {"device": name, "cpu": cpu_model(), "cores": count_cores(), "versions": versions}


def numbers_of(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def main(
    shape: str = typer.Option("llama-6.7b", help=", ".join(SHAPES)),
    tp: str = typer.Option(AUTO, help="number of ranks; auto: all visible GPUs, 2 on a CPU"),
    device: str = typer.Option(AUTO, help="auto, cpu or gpu"),
    dtype: str = typer.Option(AUTO, help="bf16, fp16 or fp32"),
    parts: str = typer.Option(",".join(WAYS), help="what to measure, with commas"),
    prompts: str = typer.Option("128,2048", help="prompt lengths, in tokens"),
    batches: str = typer.Option("1,8,32,64", help="rows of a step, or clients at once"),
    new_tokens: int = typer.Option(128, min=2, help="new tokens of each text"),
    repeats: int = typer.Option(3, min=1, help="rounds that are counted"),
    prefill_tokens: int | None = typer.Option(None, help="max_num_batched_tokens at engine level; default: its own"),
    chunk_tokens: int | None = typer.Option(None, help="chunked_prefill_size at engine level; default: its own"),
    part_s: float = typer.Option(PART_S, help="longest time of a part, in seconds"),
    models: Path = typer.Option(ROOT / "models" / "random", help="where the weights lie, and are found again"),
    out: Path | None = typer.Option(None, help="JSON file that parts are merged into; default: run/bench-gpu/..."),
) -> None:
    """Measure, print a table, then one JSON line."""
    exit_on_sigterm()
    try:
        kind = resolve_device(device)
        setting: dict[str, Any] = {"shape": shape, "tp": resolve_tp(tp, kind, 2), "device": kind}
        setting |= {"dtype": resolve_dtype(dtype, kind, "bf16"), "new_tokens": new_tokens, "repeats": repeats}
        setting |= {"prefill_tokens": prefill_tokens, "chunk_tokens": chunk_tokens}
        unknown = set(parts.split(",")) - set(WAYS)
        if shape not in SHAPES or unknown:
            raise BenchError(
                f"unknown: {', '.join(unknown) or shape}; shapes: {', '.join(SHAPES)}; parts: {', '.join(WAYS)}"
            )
        model = prepare_random(shape, setting["dtype"], models.resolve())
        name = f"{shape}-{setting['dtype']}-tp{setting['tp']}-{kind}.json"
        bench = Bench(setting, model, out or ROOT / "run" / "bench-gpu" / name)
        for way in parts.split(","):
            for prompt in numbers_of(prompts):
                say(f"{WAYS[way]}, prompt {prompt} ...")
                bench.run(way, prompt, numbers_of(batches), part_s)
    except (BenchError, MachineError, ValueError) as error:
        fail(str(error))
    print_report(table, bench.report)
