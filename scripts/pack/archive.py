"""Pack the handlers and one model's configuration into model-store/<name>.mar with torch-model-archiver.

The weights stay where they are: the archive holds their path. TP, DEVICE and DTYPE are written into a copy of
configs/<name>/ (or of configs/smollm2/, the template), each in its one place. A configuration whose model-config.yaml
says `template: <another>` holds only what differs from that one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from scripts.common.console import fail, say
from scripts.common.machine import AUTO, MachineError, resolve_device, resolve_dtype, resolve_tp
from scripts.common.paths import DEMO_MODEL, ROOT
from scripts.model.facts import attention_heads
from scripts.model.prepare import WEIGHT_PATTERNS, ModelError, prepare

HANDLERS = "handlers"  # relative to ROOT: the archiver splits its list of files at commas
CONFIGS = ROOT / "configs"
MODEL_STORE = ROOT / "model-store"
ENTRY = "deepspeed_handler.py"
MODEL_CONFIG = "model-config.yaml"
DS_CONFIG = "ds-config.json"
STARTUP_KEY = "startupTimeout"
# Requests that TorchServe hands over at a time; the handler lets as many wait as that leaves room for.
BATCH_SIZE = 1024
# Requests of a call beyond those that `handler:` states: it refuses so many at once, with a 429, a reason and advice.
SPARE_ROWS = 64
# Requests that TorchServe holds while a call runs; beyond them it answers 503 by itself, without advice. As many as the
# balancer lets in; with bodies of 128 KiB, the longest that a balancer can send again, they fill half of Java's memory.
JOB_QUEUE_SIZE = 4096
ROOM_KEYS = ("batchSize", "jobQueueSize")
BASE_LOAD_S = 300  # imports, compiled operations, warm-up, CUDA graphs
SLOWEST_BYTES_PER_S = 50e6
DOWNLOAD_S = 3600
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class PackageError(Exception):
    """The archive could not be made; the message says how to mend it."""


@dataclass(frozen=True)
class Choice:
    """How to serve a model; `auto` stands for what the machine and the configuration suggest."""

    tp: str = AUTO
    device: str = AUTO
    dtype: str = AUTO


def render(
    config_dir: Path, model_path: str, choice: Choice, handler: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """model-config.yaml and ds-config.json of `config_dir` with the path, the choice and keys of `handler:` written in.

    Raises MachineError for a choice this machine cannot honour, PackageError for a configuration without TP size.
    """
    model_config = read_model_config(config_dir)
    ds_config = json.loads((config_dir / DS_CONFIG).read_text(encoding="utf-8"))
    configured = (model_config.get("torchrun") or {}).get("nproc-per-node")
    if not isinstance(configured, int):
        raise PackageError(f"{config_dir.name}/{MODEL_CONFIG}: torchrun.nproc-per-node is missing: set it, e.g. to 2")
    device = resolve_device(choice.device)
    model_config["deviceType"] = device
    if device == "cpu":
        model_config.pop("deviceIds", None)
    model_config["torchrun"]["nproc-per-node"] = resolve_tp(choice.tp, device, configured)
    model_config["handler"] = {**(model_config.get("handler") or {}), "model_path": model_path, **(handler or {})}
    model_config = room(model_config["handler"]) | model_config
    ds_config["dtype"] = resolve_dtype(choice.dtype, device, ds_config.get("dtype", "bf16"))
    return model_config, ds_config


def read_model_config(config_dir: Path) -> dict[str, Any]:
    """model-config.yaml of `config_dir`, merged over that of its `template`. Raises PackageError for a missing one."""
    own: dict[str, Any] = yaml.safe_load((config_dir / MODEL_CONFIG).read_text(encoding="utf-8"))
    template = own.pop("template", None)
    if template is None:
        return own
    folder = config_dir.parent / str(template)
    if not (folder / MODEL_CONFIG).is_file():
        raise PackageError(f"{config_dir.name}/{MODEL_CONFIG}: template: no configs/{template}/{MODEL_CONFIG}")
    base = read_model_config(folder)
    for key in (STARTUP_KEY, *ROOM_KEYS):  # those of another model's size and limits
        base.pop(key, None)
    return merge(base, own)


def room(handler: Mapping[str, Any]) -> dict[str, int]:
    """TorchServe's sizes for what this `handler:` holds: each request reaches the handler, to be served or refused."""
    # What is no number is for the handler to read, or to refuse in its own words.
    stated = sum(value for key in ("max_running", "max_waiting") if isinstance(value := handler.get(key), int))
    rows = max(BATCH_SIZE, stated + SPARE_ROWS)
    return dict(zip(ROOM_KEYS, (rows, JOB_QUEUE_SIZE), strict=True))


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def package(
    name: str,
    model_path: str,
    choice: Choice,
    version: str = "1.0",
    model_store: Path = MODEL_STORE,
    handler: dict[str, Any] | None = None,
) -> Path:
    """Write `model_store`/<name>.mar and return its path; `handler` overrides keys of the `handler:` section.

    Raises PackageError, MachineError.
    """
    for variable, value in (("NAME", name), ("VERSION", version)):
        if not NAME_PATTERN.fullmatch(value):
            raise PackageError(f"{variable}={value} is not fit for a URL: use letters, digits, '_', '.' and '-'")
    has_own = (CONFIGS / name).is_dir()
    config_dir = CONFIGS / (name if has_own else DEMO_MODEL)
    model_config, ds_config = render(config_dir, model_path, choice, handler)
    check_ranks(model_config["torchrun"]["nproc-per-node"], Path(model_path))
    if not has_own or STARTUP_KEY not in model_config:
        model_config[STARTUP_KEY] = startup_timeout_s(Path(model_path))
    if not has_own:
        model_config |= room(model_config["handler"])
    model_store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dsserve-mar-") as scratch:
        folder = Path(scratch)
        (folder / MODEL_CONFIG).write_text(yaml.safe_dump(model_config, sort_keys=False), encoding="utf-8")
        (folder / DS_CONFIG).write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
        archive(name, version, folder, model_store)
    say(
        f"packed {name} {version}: {model_config['torchrun']['nproc-per-node']} ranks on {model_config['deviceType']}, "
        f"{ds_config['dtype']}, weights from {model_path}"
    )
    return model_store / f"{name}.mar"


def check_ranks(ranks: int, model: Path) -> None:
    """Raises PackageError for more ranks than the load would refuse, once torchrun had started them all."""
    heads = attention_heads(model)
    if heads is not None and ranks > heads:
        raise PackageError(f"TP={ranks}: the model has {heads} attention heads, and a rank needs one: lower TP")


def startup_timeout_s(model: Path) -> int:
    """Seconds that the load of this model may take: a base for any model, and its bytes at the speed of a slow disk.

    A hub id that is not here yet has an hour, for its download.
    """
    if not model.is_dir():
        return DOWNLOAD_S
    size = sum(file.stat().st_size for pattern in WEIGHT_PATTERNS for file in model.glob(pattern))
    return round(BASE_LOAD_S + size / SLOWEST_BYTES_PER_S)


def archive(name: str, version: str, config_dir: Path, model_store: Path) -> None:
    """Run torch-model-archiver on the handlers and the two configuration files. Raises PackageError with its output."""
    staging = config_dir / "staging"
    staging.mkdir()
    options = {
        "--model-name": name,
        "--version": version,
        "--handler": f"{HANDLERS}/{ENTRY}",
        "--extra-files": f"{HANDLERS},{config_dir / DS_CONFIG}",
        "--config-file": config_dir / MODEL_CONFIG,
        "--export-path": model_store,
    }
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--force"]
    command += [str(word) for pair in options.items() for word in pair]
    # The archiver clears and fills <temporary folder>/<name>: give it one that nobody else uses.
    environ = {**os.environ, "TMPDIR": str(staging)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    if done.returncode != 0:
        raise PackageError(f"torch-model-archiver failed:\n{done.stderr.strip() or done.stdout.strip()}")


def main(
    name: str = typer.Option(DEMO_MODEL, help="name under which TorchServe serves the model"),
    model: str = typer.Option(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id"),
    version: str = typer.Option("1.0", help="version of the served model"),
    tp: str = typer.Option(AUTO, help="number of ranks"),
    device: str = typer.Option(AUTO, help="auto, cpu or gpu"),
    dtype: str = typer.Option(AUTO, help="bf16, fp16 or fp32"),
    model_store: Path = typer.Option(MODEL_STORE, help="folder for the archive"),
) -> None:
    """Pack a model for TorchServe and print the archive's path."""
    try:
        typer.echo(package(name, prepare(model), Choice(tp, device, dtype), version, model_store.resolve()))
    except (PackageError, MachineError, ModelError) as error:
        fail(str(error))
