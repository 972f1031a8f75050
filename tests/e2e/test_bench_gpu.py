"""`make bench-gpu` runs to its end on CPUs with a tiny shape: every part, one and two ranks, merged into one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from scripts.serve import processes
from tests.conftest import ROOT
from tests.support.waiting import wait_for

ARGS = "--prompts 40 --batches 1,2 --new-tokens 30 --repeats 1 --prefill-tokens 16"


def bench_gpu(tp: int, parts: str, folder: Path, out: str) -> tuple[str, dict]:
    """The table, and the JSON document of the last line."""
    command = [
        "make",
        "--silent",
        "bench-gpu",
        "SHAPE=llama-tiny",
        f"TP={tp}",
        "DEVICE=cpu",
        "DTYPE=fp32",
        f"PARTS={parts}",
    ]
    command += [f"ARGS={ARGS} --models {folder} --out {folder}/{out}.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text, _, last = done.stdout.rstrip().rpartition("\n")
    return text, json.loads(last)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-gpu")


@pytest.mark.timeout(900)  # a minute on a machine that does nothing else
@pytest.mark.parametrize(
    ("tp", "runs"),
    [
        pytest.param(1, ["engine,generate"], marks=pytest.mark.long),
        pytest.param(1, ["engine,http,batching"], marks=pytest.mark.long),
        pytest.param(2, ["engine", "autotp"], marks=pytest.mark.long),
    ],
)
def test_all_parts_on_a_cpu(folder: Path, tp: int, runs: list[str]) -> None:
    out = f"tp{tp}-{'-'.join(runs).replace(',', '-')}"
    for parts in runs:
        text, report = bench_gpu(tp, parts, folder, out)
    assert report == json.loads((folder / f"{out}.json").read_text())
    assert list(report["parts"]) == ",".join(runs).split(",")
    for way, prompts in report["parts"].items():
        part = prompts["40"]
        assert part["skipped"] == {}, way
        for rows in ("1", "2"):
            numbers = part["cases"][rows]
            assert numbers["step_ms"] > 0 and numbers["tokens_per_s"] > 0 and numbers["floor_ms"] > 0, way
    engine = report["parts"]["engine"]["40"]
    assert len(engine["bytes"]) == len(engine["bandwidth"]) == tp
    assert engine["cases"]["admission"]["tokens_in_between"] == 3, "a prompt of 40 tokens is read in three parts of 16"
    assert text.count("\n| this engine | 40 |") == 2 and "left out" not in text


def test_kernel_injection_is_left_out_with_its_reason_where_there_is_no_gpu(folder: Path) -> None:
    text, report = bench_gpu(1, "kernels", folder, "kernels")
    assert report["parts"]["kernels"]["40"]["cases"] == {}
    assert "left out: kernel injection, this engine's batches, prompt 40, all:" in text and "need a GPU" in text
    log = folder / "kernels.kernels-40.log"
    assert f"the ranks' log: {log}" in text and "Traceback" in log.read_text()


@pytest.mark.timeout(300)
def test_a_run_that_is_ended_leaves_no_server(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench.gpu", "--shape", "llama-tiny", "--device", "cpu", "--tp", "1"]
    command += ["--dtype", "fp32", "--parts", "http", *ARGS.split(), "--models", str(folder)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--out", str(folder / "ended.json")], cwd=ROOT, stdout=subprocess.DEVNULL, env=env
    )
    servers: list[psutil.Process] = []
    try:
        servers = wait_for(lambda: servers_of(tmp_path), timeout_s=120)
        process.terminate()
        assert process.wait(timeout=60) != 0
        psutil.wait_procs(servers, timeout=30)
        assert not any(server.is_running() for server in servers)
    finally:
        process.kill()
        process.wait()
        for server in servers:
            if server.is_running():
                server.terminate()


def servers_of(folder: Path) -> list[psutil.Process]:
    """The TorchServe frontends whose model store lies in a folder."""
    found = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    return [process for process in found if processes.describe(process) == "TorchServe"]
