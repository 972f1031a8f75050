"""Memory and time of a load, phase by phase: ours, from shards, and from_pretrained with init_inference in every rank.

Makes a Llama checkpoint of random bf16 weights of the asked size, loads it each way on CPUs or GPUs, and prints a
table. Peaks are of memory that belongs to the process alone (RssAnon + RssShmem), above its value before the load;
pages of the model's files do not count. What a rank does is in `load_rank`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer

from scripts.common.console import fail, say
from scripts.common.machine import AUTO
from scripts.common.paths import ROOT
from scripts.model.random import LLAMA_6_7B, make_config, write_checkpoint
from scripts.model.shard import shard
from scripts.pack.archive import Choice

WAYS = ("plain", "ours", "cache")
# A layer of Llama-2-7B in bf16, and its embeddings and head.
HIDDEN, INTERMEDIATE = LLAMA_6_7B["hidden_size"], LLAMA_6_7B["intermediate_size"]
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
ENDS_BYTES = 2 * 2 * LLAMA_6_7B["vocab_size"] * HIDDEN


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes a sharded checkpoint of Llama-2-7B's layers and returns its bytes."""
    layers = max(1, round((gigabytes * 1e9 - ENDS_BYTES) / LAYER_BYTES))
    config = make_config("llama-6.7b", torch.bfloat16)
    config.num_hidden_layers = layers
    write_checkpoint(folder, config)
    return layers * LAYER_BYTES + ENDS_BYTES


def measure(way: str, model: Path, ranks: int, device: str) -> list[dict[str, Any]]:
    """One load in `ranks` processes: for each rank its phases, seconds and peaks in bytes."""
    with tempfile.TemporaryDirectory(prefix="dsserve-load-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
        command += ["-m", "scripts.bench.load_rank", way, str(model), device, folder]
        environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if device == "cpu":
            environ["DS_ACCELERATOR"] = "cpu"
        done = subprocess.run(command, cwd=ROOT, env=environ, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            fail(f"{way}: {done.stderr[-3000:]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def forget(model: Path) -> None:
    """Drops the files from the page cache, so that every way reads them from the disk."""
    os.sync()
    for file in model.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown rows: way, seconds, peak of a rank and of all together, what is held at the end, the GPU's peak."""
    columns = ["way", "s", "host peak of a rank, GiB", "together", "held at the end", "GPU peak", "weights", "phases"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for way, ranks in found.items():
        sizes = [max(rank[key] for rank in ranks) for key in ("held", "device", "weights")]
        peaks = [rank["peak"] for rank in ranks]
        numbers = [f"{size / 2**30:.2f}" for size in (max(peaks), sum(peaks), *sizes)]
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ranks[0]["seconds"].items())
        total = max(sum(rank["seconds"].values()) for rank in ranks)
        lines.append(f"| {' | '.join([way, f'{total:.1f}', *numbers, phases])} |")
    return lines


def main(
    gigabytes: float = typer.Option(10.2, help="size of the checkpoint, 10^9 bytes"),
    tp: int = typer.Option(2, help="number of ranks"),
    device: str = typer.Option("cpu", help="cpu or gpu"),
    ways: str = typer.Option(",".join(WAYS), help="which to measure"),
    folder: Path = typer.Option(
        None, help="where the checkpoint goes, and is found again; default: removed at the end"
    ),
) -> None:
    """Measure and print a table."""
    model = folder or Path(tempfile.mkdtemp(prefix="dsserve-load-model-"))
    model.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        if not (model / "config.json").is_file():
            say(f"wrote {make_checkpoint(model, gigabytes) / 1e9:.1f} GB of weights")
        for way in ways.split(","):
            if way == "cache":
                shard("measure", str(model), Choice(str(tp), "cpu", AUTO))
            forget(model)
            found[way] = measure(way, model, tp, device)
            say(f"{way}: {[round(rank['peak'] / 2**30, 2) for rank in found[way]]} GiB")
    finally:
        if found:  # also of a run that a later way ended
            typer.echo("\n".join(table(found)))
        if folder is None:
            shutil.rmtree(model, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
