"""The manifest of a shard cache: what it was made from, and whether it fits the model that is to be loaded.

Reads and writes no tensors (`shard_cache`).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsserve.core.errors import LoadError
from dsserve.loading import weight_files
from dsserve.loading.weight_source import SourceFile, look_at

MANIFEST = "manifest.json"
_CRC_BYTES = 2**24
# What decides how a model is cut and how its tensors are called.
_LIBRARIES = ("deepspeed", "transformers")


class FileEntry(BaseModel):
    """One file."""

    bytes: int
    crc32: int


class Manifest(BaseModel):
    """What a cache was made from. All but `revision` and `files` must be the same where it is used.

    Attributes:
        architecture: class of the model.
        config: digest of config.json.
        source: weight file -> what it was; `describe` does not read them, see `find_changed`.
        folder: of the weight files, where there are some; not written.
        files: file name -> its entry; those of rank r begin with `rank-<r>-`.
        aliases: for each rank, tensor name -> the name under which the same tensor is written (tied weights).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[2] = 2
    architecture: str
    config: str
    source: dict[str, SourceFile]
    tp_size: int
    dtype: str
    libraries: dict[str, str]
    revision: str | None = None
    files: dict[str, FileEntry] = {}
    aliases: list[dict[str, str]] = []
    folder: Path | None = Field(None, exclude=True)

    @classmethod
    def describe(cls, model: Any, model_folder: Path, tp_size: int, dtype: torch.dtype) -> Manifest:
        """The manifest, without files, of a cache that would fit `model` here."""
        try:
            files = weight_files.find_weight_files(model_folder).files
        except LoadError:
            files = ()  # a folder that holds nothing but the cache
        text = json.dumps(json.loads((model_folder / "config.json").read_text("utf-8")), sort_keys=True)
        return cls(
            architecture=type(model).__name__,
            config=hashlib.sha256(text.encode()).hexdigest(),
            source={file.name: look_at(file) for file in files},
            folder=model_folder if files else None,
            tp_size=tp_size,
            dtype=dtype_name(dtype),
            libraries={name: version(name) for name in _LIBRARIES},
        )

    def differences(self, other: Manifest) -> list[str]:
        """The fields in which two caches differ, their weights' content aside; a model folder without weights says
        nothing of the source."""
        fields = ["architecture", "config", "tp_size", "dtype", "libraries"]
        different = [name for name in fields if getattr(self, name) != getattr(other, name)]
        if self.source and other.source and self.source.keys() != other.source.keys():
            different.append("source")
        return different


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, without the library's name."""
    return str(dtype).removeprefix("torch.")


def cache_folder(cache: Path, tp_size: int, dtype: torch.dtype) -> Path:
    """Where the shards for so many ranks in this dtype lie."""
    return cache / f"tp{tp_size}-{dtype_name(dtype)}"


def read_manifest(folder: Path, wanted: Manifest) -> tuple[str, Manifest | None]:
    """A reason not to use the cache, or its manifest: it fits, and all files are there."""
    file = folder / MANIFEST
    if not file.is_file():
        return f"{folder} is not there (`make shard` writes it)", None
    try:
        manifest = Manifest.model_validate_json(file.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError):
        return f"{file} is not a manifest of this version; write it again with `make shard`", None
    different = manifest.differences(wanted)
    if different:
        return f"{folder} was made with another {', '.join(different)}; write it again with `make shard`", None
    for name, entry in manifest.files.items():
        part = folder / name
        if not part.is_file() or part.stat().st_size != entry.bytes:
            return f"{part} is missing or cut short; write it again with `make shard`", None
    return "", manifest


def crc32(file: Path) -> int:
    """CRC-32 of a file (5 GB/s on one core, where SHA-256 makes 1.5): it finds damage, not forgery."""
    value = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CRC_BYTES):
            value = zlib.crc32(chunk, value)
    return value
