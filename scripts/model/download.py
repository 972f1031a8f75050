"""Download a model from the Hugging Face hub into models/<name>: safetensors, tokenizer, configuration, no more.

The folder appears when it is complete; a broken download goes on where it stopped. The token for gated models comes
from HF_TOKEN (or `hf auth login`). Does not convert weights and does not run code of the model.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

import typer

from scripts.common.console import fail, say
from scripts.common.paths import ROOT
from scripts.model.prepare import HUB_ID, ModelError, check_folder

# Files of the top folder: copies in other formats (original/, consolidated.safetensors, onnx/) are left out.
TEXT = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.tiktoken")
WEIGHTS = {"safetensors": ("model*.safetensors",), "bin": ("pytorch_model*.bin",)}
# Beside the files themselves: the hub's client keeps a few megabytes of notes.
SPARE_BYTES = 2**28


def download(
    model_id: str, revision: str | None = None, weights: str = "safetensors", models: Path = ROOT / "models"
) -> Path:
    """Fetch `model_id` into `models`/<name> and return the folder; what is there already is checked and left.

    Raises ModelError: the hub cannot be reached, the model or revision does not exist, is gated, has no weights of the
    asked format, or does not fit on the disk.
    """
    if not HUB_ID.fullmatch(model_id):
        raise ModelError(f"{model_id} is no hub id: write org/name")
    folder = models / model_id.rpartition("/")[2]
    if folder.is_dir():
        say(f"{folder.name} is there already; remove {folder} to download it again")
        return check_folder(folder)
    partial = folder.parent / f".{folder.name}.partial"
    commit, sizes = list_files(model_id, revision)
    wanted = select(model_id, list(sizes), weights)
    needed = sum(sizes[name] for name in wanted)
    check_space(folder.parent, needed, partial)
    say(f"downloading {model_id} at {commit[:12]}: {len(wanted)} files, {needed / 1e9:.2f} GB")
    fetch(model_id, commit, wanted, partial)
    missing = [name for name in wanted if size_of(partial / name) != sizes[name]]
    if missing:
        raise ModelError(f"{model_id}: {', '.join(missing[:3])} did not arrive whole; run the command again")
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    check_folder(partial)
    partial.rename(folder)
    return folder


def size_of(file: Path) -> int:
    """Bytes of a file, -1 without one."""
    return file.stat().st_size if file.is_file() else -1


def list_files(model_id: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit that `revision` stands for, and the bytes of each file. Raises ModelError."""
    from huggingface_hub import HfApi

    with explained(model_id, revision):
        info = HfApi().model_info(model_id, revision=revision, files_metadata=True)
        return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []}


def select(model_id: str, names: list[str], weights: str) -> list[str]:
    """The files to fetch. Raises ModelError where there are none of that format."""
    top = [name for name in names if "/" not in name]
    chosen = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHTS[weights])]
    if not chosen:
        others = [other for other in WEIGHTS if any(fnmatch.filter(top, pattern) for pattern in WEIGHTS[other])]
        mend = f"; it has {others[0]} files: add --weights {others[0]}" if others else ""
        raise ModelError(f"{model_id} has no {weights} weights{mend}")
    text = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in TEXT)]
    index_of_others = {"safetensors": "*.bin.index.json", "bin": "*.safetensors.index.json"}[weights]
    return sorted({*chosen, *(name for name in text if not fnmatch.fnmatchcase(name, index_of_others))})


def check_space(folder: Path, needed: int, partial: Path) -> None:
    """Raises ModelError where `needed` bytes, less what lies in `partial`, do not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if free < needed - there + SPARE_BYTES:
        raise ModelError(f"{folder}: {(needed - there) / 1e9:.1f} GB are missing, {free / 1e9:.1f} GB are free")


def fetch(model_id: str, commit: str, names: list[str], folder: Path) -> None:
    """Download these files into `folder`. Raises ModelError."""
    from huggingface_hub import snapshot_download

    with explained(model_id, commit):
        snapshot_download(model_id, revision=commit, allow_patterns=names, local_dir=folder)


@contextlib.contextmanager
def explained(model_id: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises into one line that says how to mend it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{model_id}"
        raise ModelError(f"{model_id} is gated: accept its terms at {page} and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model_id} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{model_id}: the hub has no such model, or HF_TOKEN may not see it") from None
    except errors.OfflineModeIsEnabled:
        raise ModelError("HF_HUB_OFFLINE is set: unset it to download, or name a local folder") from None
    except Exception as error:
        # Its HTTP client, httpx or httpx2 by the hub's version, raises errors of its own.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        raise ModelError(
            f"{model_id}: the hub cannot be reached ({type(error).__name__}); try again, or bring the model's "
            "folder here by other means and name it with MODEL=/folder"
        ) from None


def main(
    model: str = typer.Argument(help="hub id, org/name"),
    revision: str | None = typer.Option(None, help="branch, tag or commit"),
    weights: str = typer.Option("safetensors", help="safetensors, or bin where a model has nothing else"),
) -> None:
    """Download MODEL and print its folder."""
    if weights not in WEIGHTS:
        fail(f"--weights {weights} is unknown: use {' or '.join(WEIGHTS)}")
    try:
        typer.echo(str(download(model, revision, weights)))
    except ModelError as error:
        fail(str(error))


if __name__ == "__main__":
    typer.run(main)
