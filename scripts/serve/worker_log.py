"""What the worker's log says while a model loads: stages that the handler announces, and why it died.

TorchServe prefixes every line of a worker with date, thread and stream, torch adds `[rank0]:` to tracebacks, and the
ranks' lines interleave. TorchServe itself reports only "worker died".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

STAGE_MARK = "[dsserve] "
MODEL_LOG = " MODEL_LOG - "
DIED = "Backend worker process died"
LINE = re.compile(r"\[\w+ *\] (?P<stream>\S+) MODEL_LOG - (?P<text>.*)$")
RANK = re.compile(r"^(\[rank\d+\]:) ?")
LOAD_ERROR = re.compile(r"\bLoadError: (?P<message>.+)$")
EXCEPTION = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(: .*)?$")
# Exceptions that only report that another one happened: torchrun's summary, and TorchServe's two ways to hide a cause.
SUMMARY = "ChildFailedError"
HOLLOW = (SUMMARY, "No module named 'ts.torch_handler.", "500 - Unknown exception", "507 - System out of memory")


class LogTail:
    """Reads the lines that were added to a log file since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def skip(self) -> None:
        """Starts at the file's present end."""
        self.offset = self.path.stat().st_size if self.path.is_file() else 0

    def new_lines(self) -> list[str]:
        """Complete lines only; none while the file does not exist."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()


def find_stages(lines: Iterable[str]) -> list[str]:
    """The handler's own announcements, without TorchServe's prefix."""
    return [plain(line).partition(STAGE_MARK)[2].strip() for line in lines if STAGE_MARK in line]


def plain(line: str) -> str:
    """A line of `log_format: json` as it is with `text`; other lines as they are."""
    head, mark, text = line.partition(MODEL_LOG)
    if not text.startswith("{"):
        return line
    try:
        return f"{head}{mark}{json.loads(text)['message']}"
    except (ValueError, KeyError, TypeError):
        return line


def find_error(lines: Iterable[str]) -> str | None:
    """Why the worker cannot load, in one line; None while nothing says that it died.

    A LoadError of the handler is taken as it is. Any other death gives the last line of the first traceback: what
    follows are its consequences, on this rank and on the others.
    """
    lines = [plain(line) for line in lines]
    for line in lines:
        match = LOAD_ERROR.search(line)
        if match:
            return match["message"].strip()
    if not any(DIED in line or SUMMARY in line for line in lines):
        return None
    return next(exceptions(lines), "the worker died without saying why")


def exceptions(lines: Iterable[str]) -> Iterator[str]:
    """Last lines of all tracebacks that tell a cause, e.g. `ImportError: no module named x`, in their order."""
    open_tracebacks: set[tuple[str, str]] = set()
    for line in lines:
        match = LINE.search(line)
        if match is None:
            continue
        text = match["text"]
        rank = RANK.match(text)
        source = (match["stream"], rank[1] if rank else "")
        text = text[rank.end() :] if rank else text
        if text.startswith("Traceback (most recent call last)"):
            open_tracebacks.add(source)
        elif source in open_tracebacks and EXCEPTION.match(text):
            open_tracebacks.discard(source)
            if not any(hollow in text for hollow in HOLLOW):
                yield text
