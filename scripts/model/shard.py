"""Cut a model for TP ranks once, on CPUs: writes `shards/` into its folder, which workers then load instead of it.

Needs the memory of the whole model once, and no GPU. What a rank does is in `shard_rank`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from scripts.common.console import fail, say
from scripts.common.machine import AUTO, MachineError
from scripts.common.paths import DEMO_MODEL, ROOT
from scripts.model.prepare import ModelError, prepare
from scripts.pack.archive import CONFIGS, Choice, PackageError, render


class ShardError(Exception):
    """Nothing was written; the message says why."""


def shard(name: str, model_path: str, choice: Choice, cache: Path | None = None) -> Path:
    """Write the shards and return their folder.

    Args:
        name: the configuration in configs/ whose keys count; the demo's where there is none.
        cache: folder for the shards; default: `shards` in the model's folder.

    Raises ShardError, MachineError, PackageError.
    """
    config_dir = CONFIGS / name if (CONFIGS / name).is_dir() else CONFIGS / DEMO_MODEL
    dtype = "bf16" if choice.dtype == AUTO else choice.dtype  # of the machine that serves, not of this one
    model_config, ds_config = render(config_dir, model_path, Choice(choice.tp, "cpu", dtype))
    model_config["deepspeed"] = {**ds_config, **model_config.get("deepspeed", {}), "config": None}
    model_config["deepspeed"].pop("quantization", None)  # happens after the shards are read
    if cache is not None:
        model_config["handler"]["shard_cache"] = str(cache.resolve())
    with tempfile.TemporaryDirectory(prefix="dsserve-shard-") as folder:
        return Path(_run_ranks(model_config, Path(folder))["folder"])


def _run_ranks(model_config: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = folder / "model-config.json"
    settings.write_text(json.dumps(model_config))
    ranks = model_config["torchrun"]["nproc-per-node"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
    command += ["-m", "scripts.model.shard_rank", str(folder)]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode != 0:
        error = folder / "error"
        raise ShardError(error.read_text() if error.is_file() else "a rank ended without saying why (see above)")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def main(
    name: str = typer.Option(DEMO_MODEL, help="name of the configuration in configs/"),
    model: str = typer.Option(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id"),
    tp: str = typer.Option(AUTO, help="number of ranks"),
    dtype: str = typer.Option(AUTO, help="bf16 (default), fp16 or fp32"),
    cache: Path = typer.Option(None, help="folder for the shards; default: `shards` in the model's folder"),
) -> None:
    """Shard a model and print the folder."""
    started_s = time.monotonic()
    try:
        folder = shard(name, prepare(model), Choice(tp, "cpu", dtype), cache)
    except (ShardError, PackageError, MachineError, ModelError) as error:
        fail(str(error))
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"wrote {size / 2**30:.2f} GiB in {time.monotonic() - started_s:.1f} s")
    typer.echo(folder)


if __name__ == "__main__":
    typer.run(main)
