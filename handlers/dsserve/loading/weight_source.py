"""Whether the weight files are those that a shard cache was made from: by their whole content, read once.

A file whose size, times and inode are those that a digest was written down with is not read again. The change time is
among them: no program can set it back, so a tensor that is repaired in place shows even where the modification time is
kept. Cached files took 0.1 s a GiB with 16 cores and 1.1 s with one (Xeon of an H200 host, November 2026); a disk is
slower. A new copy of the files is read once, and again where the cache's folder cannot be written. Knows no tensors.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

logger = logging.getLogger(__name__)

_PIECE = 2**24
_MOST_THREADS = 16
# A file that changes twice within a tick of the clock has one change time: what is younger is not relied on.
_RACY_NS = 2 * 10**9


class SourceFile(BaseModel):
    """One weight file as it was at a time.

    Attributes:
        bytes: its size.
        digest: SHA-256 over those of its pieces of 16 MiB; empty where it was not read.
        stamp: modification and change time in ns, inode; empty where the file had just changed.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int
    digest: str = ""
    stamp: list[int] = []

    def is_still(self, now: SourceFile) -> bool:
        """Whether a file that looks like `now` has the content that was read then."""
        return bool(self.digest and self.stamp) and (self.bytes, self.stamp) == (now.bytes, now.stamp)

    def is_other(self, now: SourceFile) -> bool:
        """Whether the file has changed for certain, as far as can be said without its content."""
        return self.bytes != now.bytes or bool(self.stamp and now.stamp and self.stamp != now.stamp)


def look_at(file: Path) -> SourceFile:
    """The file without its content."""
    found = file.stat()
    is_young = time.time_ns() - found.st_ctime_ns < _RACY_NS
    stamp = [] if is_young else [found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return SourceFile(bytes=found.st_size, stamp=stamp)


def read(folder: Path, names: list[str], sharers: int = 1) -> dict[str, SourceFile]:
    """The files with their digests.

    Args:
        sharers: processes of this host that read at the same time.
    """
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // sharers))
    started = time.perf_counter()
    # A change while a file is read changes the stamp that the next start sees.
    found = {
        name: look_at(folder / name).model_copy(update={"digest": digest(folder / name, threads)}) for name in names
    }
    total, seconds = sum(file.bytes for file in found.values()) / 2**30, time.perf_counter() - started
    if found:
        logger.info("[dsserve] %d weight file(s) compared by content, %.2f GiB, %.1f s", len(found), total, seconds)
    return found


def digest(file: Path, threads: int) -> str:
    """The digest of a whole file, its pieces computed side by side."""
    with file.open("rb") as opened, ThreadPoolExecutor(threads) as pool:

        def of_piece(at: int) -> bytes:
            return hashlib.sha256(os.pread(opened.fileno(), _PIECE, at)).digest()

        return hashlib.sha256(b"".join(pool.map(of_piece, range(0, file.stat().st_size, _PIECE)))).hexdigest()


def find_changed(
    folder: Path, written: Mapping[str, SourceFile], names: list[str], notes: Path, sharers: int
) -> list[str]:
    """Those of `names` whose content is not the one that was written down.

    Args:
        folder: of the weight files.
        written: what the cache was made from, by name.
        notes: a folder that remembers what was read for the next start; where it cannot be written each start reads.
        sharers: see `read`.
    """
    now = {name: look_at(folder / name) for name in names}
    unread = [name for name in names if not any(seen.is_still(now[name]) for seen in _seen(name, written[name], notes))]
    resized = [name for name in unread if now[name].bytes != written[name].bytes]
    found = read(folder, [name for name in unread if name not in resized], sharers)
    for name, file in found.items():
        if file.digest == written[name].digest and file.stamp:
            _note(notes, name, file)
    return resized + [name for name, file in found.items() if file.digest != written[name].digest]


def _seen(name: str, written: SourceFile, notes: Path) -> list[SourceFile]:
    """The file as it was when the cache was written, and at a start since then."""
    try:
        noted = SourceFile.model_validate_json((notes / _note_name(name)).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return [written]
    return [written, noted] if noted.digest == written.digest else [written]


def _note(notes: Path, name: str, file: SourceFile) -> None:
    temporary = notes / f".{_note_name(name)}.{os.getpid()}"
    try:
        temporary.write_text(file.model_dump_json(), "utf-8")
        temporary.replace(notes / _note_name(name))
    except OSError as error:
        logger.warning("[dsserve] %s cannot be written (%s): every start reads all weights", notes, error.strerror)


def _note_name(name: str) -> str:
    return f"seen-{name}.json"
