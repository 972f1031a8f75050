"""Each rank's part of a sharded model, written once, so that later starts read only that part.

`<cache>/tp2-bfloat16/` holds manifest.json, safetensors files of at most 1 GiB for each rank, and the reference logits
of the self-check. The manifest is written last and the folder renamed at the end: what is incomplete has no name that
is looked for. A cache of another model, dtype, number of ranks or library is named in the log and not used.
Holds AutoTP shards only (not kernel injection); quantization happens after it is read.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dsserve.core.errors import LoadError
from dsserve.loading.shard_manifest import MANIFEST, FileEntry, Manifest, cache_folder, crc32, read_manifest
from dsserve.loading.weight_source import find_changed, read
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo

logger = logging.getLogger(__name__)

FOLDER = "shards"
_REFERENCE = "reference.safetensors"
_FILE_BYTES = 2**30
_CHECKERS = 4  # threads that compare checksums beside the one that reads


@dataclass(frozen=True)
class Shards:
    """A complete cache that fits the model."""

    folder: Path
    manifest: Manifest

    def fill(self, module: nn.Module, rank: int, device: torch.device) -> None:
        """Gives every parameter and buffer of a sharded skeleton its values; on a CPU they stay pages of the file.

        Raises:
            LoadError: a file that its checksum does not fit, or tensors that are not the module's.
        """
        tensors = {**dict(_parameters(module)), **dict(module.named_buffers(remove_duplicate=False))}
        names = _names_of_one(self.manifest.aliases[rank])
        files = [name for name in self.manifest.files if name.startswith(f"rank-{rank}-")]
        total, read, started = sum(self.manifest.files[name].bytes for name in files), 0, time.perf_counter()
        with ThreadPoolExecutor(_CHECKERS) as checkers:
            checks = [checkers.submit(self._check, name) for name in files]
            for count, file in enumerate(files, 1):
                # One file at a time: the skeleton's empty tensors are freed as they are replaced.
                for first, value in load_file(self.folder / file, device=str(device)).items():
                    for name in (first, *names.get(first, ())):
                        self._put(value, name, tensors.pop(name, None))
                read += self.manifest.files[file].bytes
                _report(rank, "read", count, read, total, started, len(files))
            for check in checks:
                check.result()
        if tensors:
            self._refuse(f"other tensors (none for {', '.join(sorted(tensors)[:3])})")

    def _put(self, value: torch.Tensor, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            self._refuse(f"other tensors ({name} is too many)")
        elif tensor.shape != value.shape:
            self._refuse(f"another shape of {name}")
        else:
            tensor.data = value

    @property
    def reference(self) -> SelfCheck | None:
        """The unsharded model's logits; None where the cache was written with the self-check off."""
        if _REFERENCE not in self.manifest.files:
            return None
        self._check(_REFERENCE)
        found = load_file(self.folder / _REFERENCE)
        dtype = getattr(torch, self.manifest.dtype)
        limit = float(found["limit"])
        return SelfCheck(found["token_ids"], found["logits"], dtype, limit, self.manifest.architecture)

    def _check(self, name: str) -> None:
        if crc32(self.folder / name) != self.manifest.files[name].crc32:
            self._refuse(f"a damaged {name}: its checksum is another")

    def _refuse(self, what: str) -> None:
        raise LoadError(f"shard cache {self.folder} has {what}; remove the folder, or write it again with `make shard`")


def find_shards(wanted: Manifest, cache: Path, rank: RankInfo) -> Shards | None:
    """The cache for this model, or None, with the reason in the log; all ranks find the same. All must call it."""
    folder = cache_folder(cache, wanted.tp_size, getattr(torch, wanted.dtype))
    reason, manifest = read_manifest(folder, wanted)
    if manifest is not None:
        reason = _other_weights(folder, manifest, wanted, rank)
        manifest = None if reason else manifest
    if reason and (folder.is_dir() or rank.is_leader):
        level = logging.WARNING if folder.is_dir() else logging.INFO
        logger.log(level, "[dsserve] rank %d: no shard cache: %s", rank.rank, reason)
    usable = agree_on_least(int(manifest is not None), rank)
    return Shards(folder, manifest) if usable and manifest else None


def _other_weights(folder: Path, written: Manifest, wanted: Manifest, rank: RankInfo) -> str:
    """Why the cache is not of these weights; empty where it is. The ranks of a host share the files."""
    if wanted.folder is None or not written.source:
        return ""
    names, sharers = sorted(wanted.source)[rank.local_rank :: rank.local_world_size], rank.local_world_size
    changed = find_changed(wanted.folder, written.source, names, folder, sharers)
    if not changed:
        return ""
    return f"{folder} was made from another {', '.join(changed[:3])} (source); write it again with `make shard`"


def write_shards(module: nn.Module, check: SelfCheck | None, manifest: Manifest, cache: Path, rank: RankInfo) -> Path:
    """Writes this rank's part; rank 0 adds reference and manifest and gives the folder its name. All must call it.

    Returns the folder. One that has the name already is replaced when the new one is complete.

    Raises:
        LoadError: a folder that cannot be written, tensors that would be lost, weight files that changed meanwhile.
    """
    try:
        return _write(module, check, manifest, cache, rank)
    except OSError as error:
        raise LoadError(
            f"shard cache {cache} cannot be written ({error}): free space there, or name another folder by "
            "handler.shard_cache"
        ) from error


def _write(module: nn.Module, check: SelfCheck | None, manifest: Manifest, cache: Path, rank: RankInfo) -> Path:
    folder = cache_folder(cache, manifest.tp_size, getattr(torch, manifest.dtype))
    partial = folder.with_name(f".{folder.name}.partial")
    if rank.is_leader:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait(rank)
    tensors, aliases = _distinct(module)
    files = _write_parts(tensors, partial, rank.rank)
    (partial / f"rank-{rank.rank}.json").write_text(json.dumps({"files": files, "aliases": aliases}))
    _wait(rank)
    if rank.is_leader:
        _complete(partial, folder, check, manifest)
    _wait(rank)
    return folder


def _write_parts(tensors: dict[str, torch.Tensor], folder: Path, rank: int) -> dict[str, dict[str, int]]:
    files, written, started = {}, 0, time.perf_counter()
    total = sum(tensor.nbytes for tensor in tensors.values())
    for count, names in enumerate(_groups(tensors), 1):
        file = folder / f"rank-{rank}-{count:03d}.safetensors"
        save_file({name: tensors[name].detach().cpu().contiguous() for name in names}, file)
        file.chmod(0o644)  # safetensors makes it its owner's alone
        files[file.name] = {"bytes": file.stat().st_size, "crc32": crc32(file)}
        written += sum(tensors[name].nbytes for name in names)
        _report(rank, "wrote", count, written, total, started)
    return files


def _complete(partial: Path, folder: Path, check: SelfCheck | None, manifest: Manifest) -> None:
    parts = [json.loads((partial / f"rank-{rank}.json").read_text()) for rank in range(manifest.tp_size)]
    files = {name: FileEntry(**entry) for part in parts for name, entry in part["files"].items()}
    for rank in range(manifest.tp_size):
        (partial / f"rank-{rank}.json").unlink()
    if check is not None:
        limit = torch.tensor(check.limit, dtype=torch.float64)
        save_file({"token_ids": check.token_ids, "logits": check.logits, "limit": limit}, partial / _REFERENCE)
        file = partial / _REFERENCE
        file.chmod(0o644)
        files[_REFERENCE] = FileEntry(bytes=file.stat().st_size, crc32=crc32(file))
    source = read(manifest.folder, sorted(manifest.source)) if manifest.folder else {}
    if any(manifest.source[name].is_other(now) for name, now in source.items()):
        raise LoadError(f"the weight files in {manifest.folder} changed while they were sharded; shard them again")
    aliases = [part["aliases"] for part in parts]
    whole = manifest.model_copy(update={"files": files, "aliases": aliases, "source": source})
    (partial / MANIFEST).write_text(whole.model_dump_json(indent=2) + "\n")
    for file in partial.iterdir():  # on the disk before the name says so
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _distinct(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor once, and the other names of those that have several. Raises LoadError for one that would be lost.

    Buffers that no checkpoint holds (rotary frequencies) are among them.
    """
    for path, part in module.named_modules():
        hidden = [name for name, value in vars(part).items() if isinstance(value, torch.Tensor)]
        if hidden:
            raise LoadError(f"{path}.{hidden[0]} is neither parameter nor buffer: this model cannot be cached")
    tensors, aliases, first = {}, {}, dict[int, str]()
    for name, tensor in [*_parameters(module), *module.named_buffers(remove_duplicate=False)]:
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = tensor
        else:
            aliases[name] = known
    return tensors, aliases


def _names_of_one(aliases: dict[str, str]) -> dict[str, list[str]]:
    """The name under which a tensor is written -> its other names."""
    names: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        names.setdefault(name, []).append(alias)
    return names


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def _groups(tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of at most 1 GiB together, or of one tensor."""
    group, size = list[str](), 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > _FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    if group:
        yield group


def _wait(rank: RankInfo) -> None:
    agree_on_least(0, rank)


def _report(rank: int, verb: str, count: int, done: int, total: int, started: float, files: int | None = None) -> None:
    of = f" of {files}" if files else ""
    logger.info(
        "[dsserve] rank %d: %s file %d%s, %.2f of %.2f GiB, %.1f s",
        rank, verb, count, of, done / 2**30, total / 2**30, time.perf_counter() - started,
    )  # fmt: skip
