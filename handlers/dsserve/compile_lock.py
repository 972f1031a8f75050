"""Locks of torch's extension builder that a killed process left behind, which others would wait for without end.

The builder marks a running compilation by a file that only its writer removes. What is compiled here is guarded by a
lock of the kernel's beside it, which ends with its process: whoever holds that one knows that such a file means
nothing. Of DeepSpeed's operations, which other programs compile too, only the file's age says so. Does not compile.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

logger = logging.getLogger(__name__)

_BATON = "lock"  # torch.utils.file_baton
# DeepSpeed's operations take one minute at most to compile.
STALE_AFTER_S = 300.0


@contextlib.contextmanager
def compiling(name: str) -> Iterator[None]:
    """Within the block no other process of ours compiles the extension `name`, and no dead one's lock is in the way."""
    with (_folder(name) / "dsserve.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        drop_stale_lock(name, 0.0)
        yield


def drop_stale_lock(name: str, older_than_s: float = STALE_AFTER_S) -> None:
    """Removes the builder's lock of the extension `name` if it is that old."""
    baton = _folder(name) / _BATON
    with contextlib.suppress(FileNotFoundError):
        if time.time() - baton.stat().st_mtime >= older_than_s:
            baton.unlink()
            logger.warning("[dsserve] %s: a compilation was killed; its lock is removed", name)


def _folder(name: str) -> Path:
    return Path(_get_build_directory(name, verbose=False))
