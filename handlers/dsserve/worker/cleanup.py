"""Removes what ranks that were killed left on this host: shared-memory segments, torchrun's log folders, build locks.

Only ours, and only what no living process holds: names with this user's id, or folders beside this worker's own. Does
not remove TorchServe's sockets: its workers use the same names again, and `make stop` clears their folder.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
# A segment exists for a moment before its owner maps it.
MIN_AGE_S = 60.0
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_TORCHRUN_LOGS = "torchelastic_ts"


def sweep(torchrun_logs: Path | None, shared_memory: Path = SHARED_MEMORY, min_age_s: float = MIN_AGE_S) -> list[Path]:
    """Removes the leftovers of dead owners and returns their paths.

    Args:
        torchrun_logs: the folder in which TorchServe's torchruns make one folder each; None = there is none.
    """
    segments = _old(shared_memory.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"), min_age_s)
    folders = _old(torchrun_logs.iterdir(), min_age_s) if torchrun_logs else []
    if not segments and not folders:
        return []
    held = list(_held_paths())
    swept = [path for path in segments + folders if not any(_is_within(name, path) for name in held)]
    for path in swept:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if swept:
        logger.info("[dsserve] removed %d leftover(s) of dead ranks", len(swept))
    return swept


def sweep_build_locks(extensions: Path | None = None, min_age_s: float = MIN_AGE_S) -> list[Path]:
    """Removes locks of compilations that were killed, for which every later load would wait for ever.

    Other hosts and containers may share the folder, whose processes are not seen here: what they compile stays.

    Args:
        extensions: torch's folder of compiled operations; None = where torch looks.
    """
    if extensions is None:
        from torch.utils.cpp_extension import get_default_build_root

        extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    from dsserve.kernels.compile_lock import STALE_AFTER_S, quiet_for, was_abandoned

    locks = _old(itertools.chain(extensions.glob("*/lock"), extensions.glob("*/*/lock")), min_age_s)
    busy = set(_working_folders()) if locks else set()

    def is_dead(folder: Path) -> bool:
        return was_abandoned(folder) or (folder not in busy and quiet_for(folder) >= STALE_AFTER_S)

    swept = [lock for lock in locks if is_dead(lock.parent)]
    for lock in swept:
        lock.unlink(missing_ok=True)
        logger.warning("[dsserve] removed the lock of a compilation that was killed: %s", lock.parent.name)
    return swept


def _working_folders() -> Iterator[Path]:
    """Where this user's living processes work; a compilation works in its build folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (process / "cwd").readlink()


def torchrun_log_folder() -> Path | None:
    """`torchelastic_ts` in TorchServe's log folder: this worker's torchrun has a folder in it, and so had dead ones."""
    error_file = os.environ.get(_ERROR_FILE, "")
    return next((path for path in Path(error_file).parents if path.name == _TORCHRUN_LOGS), None)


def _old(paths: Iterator[Path], min_age_s: float) -> list[Path]:
    found, user, now = [], os.getuid(), time.time()
    for path in paths:
        with contextlib.suppress(OSError):
            stat = path.lstat()
            if stat.st_uid == user and now - stat.st_mtime > min_age_s and not path.is_symlink():
                found.append(path)
    return found


def _held_paths() -> Iterator[str]:
    """Files that this user's living processes have mapped, or name as torchrun's error file."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid != os.getuid():
                continue
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if "/deepspeed_allreduce_buffer_" in line:
                    yield line[line.index("/") :]
            for entry in (process / "environ").read_bytes().split(b"\0"):
                if entry.startswith(_ERROR_FILE.encode() + b"="):
                    yield entry.partition(b"=")[2].decode(errors="replace")


def _is_within(name: str, path: Path) -> bool:
    return name == str(path) or name.startswith(f"{path}/")
