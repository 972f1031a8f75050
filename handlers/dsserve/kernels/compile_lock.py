"""Locks of torch's extension builder that a killed process left behind, which others would wait for without end.

The builder marks a running compilation by a file that only its writer removes. What is compiled here is guarded by a
lock of the kernel's beside it, which ends with its process, also where hosts or containers share the folder. It holds a
mark while something is compiled: a mark that nobody guards is a killed compilation's. Of other programs' compilations
only their folder says something: one in which no file changes for long is dead. Does not compile.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from torch.utils.cpp_extension import _get_build_directory

logger = logging.getLogger(__name__)

_BATON = "lock"  # torch.utils.file_baton
_GUARD = "dsserve.lock"
_MARK = "compiling\n"
# One file of DeepSpeed's operations takes two minutes at most to compile.
STALE_AFTER_S = 600.0


@contextlib.contextmanager
def compiling(name: str, others_compile: bool = False) -> Iterator[None]:
    """Within the block no other process of ours compiles the extension `name`, and no dead one's lock is in the way.

    Args:
        others_compile: other programs compile it too, under the builder's lock alone (DeepSpeed's operations).
    """
    folder = _folder(name)
    with (folder / _GUARD).open("a+") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not others_compile or _has_mark(guard) or quiet_for(folder) >= STALE_AFTER_S:
            _remove_baton(folder)
        guard.truncate(0)
        guard.write(_MARK)
        guard.flush()
        try:
            yield
        finally:  # a compilation that fails removes the builder's lock itself
            guard.truncate(0)


def was_abandoned(folder: Path) -> bool:
    """Whether a compilation of ours was killed in this build folder, on whatever host."""
    try:
        with (folder / _GUARD).open("r") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _has_mark(guard)
    except OSError:  # there is none, or its owner lives
        return False


def quiet_for(folder: Path) -> float:
    """Seconds since a file of the folder changed, by the clock that all who share it see."""
    newest = 0.0
    for path in folder.iterdir():
        if path.name != _GUARD:
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.stat().st_mtime)
    return time.time() - newest


def _has_mark(guard: IO[str]) -> bool:
    guard.seek(0)
    return guard.read() == _MARK


def _remove_baton(folder: Path) -> None:
    baton = folder / _BATON
    if baton.exists():
        baton.unlink(missing_ok=True)
        logger.warning("[dsserve] %s: a compilation was killed; its lock is removed", folder.name)


def _folder(name: str) -> Path:
    return Path(_get_build_directory(name, verbose=False))
