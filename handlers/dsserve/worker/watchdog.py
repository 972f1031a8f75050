"""Ends this rank when a call takes too long, or when it has outlived its parents. One daemon thread a rank.

Neither DeepSpeed's shared-memory all-reduce nor NCCL inside a CUDA graph has a time-out: a rank that waits there for
another one waits for ever, so its process is ended and TorchServe starts the worker anew. All times are of the
monotonic clock: a jump of the wall clock ends nothing. A process that is stopped (SIGSTOP) cannot watch itself; its
peers' watchdogs end them, and their torchrun then kills it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dsserve.parallel.parent_watch import Parents

logger = logging.getLogger(__name__)

POLL_S = 0.1
PARENTS_POLL_S = 1.0
# A server that is killed closes its sockets a moment before its children get another parent.
LAST_LOOK_S = 0.5
_FRAMES = 6


class Watchdog:
    """Limits of one rank. `start` it once; without that it watches nothing."""

    def __init__(self, rank: int, parents: Parents | None = None) -> None:
        self._rank = rank
        self._parents = parents
        self._limit: tuple[float, float, str] | None = None
        self._end_at: float | None = None

    def start(self) -> Watchdog:
        """Starts the thread; returns itself."""
        threading.Thread(target=self._watch, name="dsserve-watchdog", daemon=True).start()
        if self._parents is not None and self._parents.server is not None:
            atexit.register(self._look_once_more, self._parents)
        return self

    @contextlib.contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """Ends the process if the block takes longer. Blocks do not nest; costs about a microsecond."""
        self._limit = (time.monotonic() + seconds, seconds, what)
        try:
            yield
        finally:
            self._limit = None

    def end_in(self, seconds: float) -> None:
        """Ends the process a little later, when the reply that says so has left."""
        self._end_at = time.monotonic() + seconds

    def _watch(self) -> None:
        next_look = 0.0
        while True:
            time.sleep(POLL_S)
            now, limit = time.monotonic(), self._limit
            if self._end_at is not None and now > self._end_at:
                end_process()
            if limit is not None and now > limit[0]:
                logger.critical(
                    "[dsserve] rank %d: %s takes longer than %.1f s; ending the rank. %s",
                    self._rank, limit[2], limit[1], describe_stacks(),
                )  # fmt: skip
                end_process()
            if self._parents is not None and now >= next_look:
                next_look = now + PARENTS_POLL_S
                self._look_at(self._parents)

    def _look_once_more(self, parents: Parents) -> None:
        """TorchServe's worker leaves by itself when its socket closes; the interpreter's end stops this thread, and may
        then wait for ever for what other ranks or libraries hold."""
        until = time.monotonic() + LAST_LOOK_S
        while time.monotonic() < until:
            self._look_at(parents)
            time.sleep(POLL_S / 10)

    def _look_at(self, parents: Parents) -> None:
        lost = parents.lost()
        if lost:
            # Nobody may read the log any more, and a full pipe would hold us: no line, the end.
            parents.end_launcher()
            os._exit(1)


def end_process() -> None:
    """Ends this process at once, past all clean-up that could hang, with what was logged written out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def describe_stacks() -> str:
    """Where each thread is, innermost call first, as file:line(function); never a value."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        places: list[str] = []
        step: FrameType | None = frame
        while step is not None and len(places) < _FRAMES:
            code = step.f_code
            places.append(f"{Path(code.co_filename).name}:{step.f_lineno}({code.co_name})")
            step = step.f_back
        stacks.append(f"{names.get(ident, 'thread')}: {' < '.join(places)}")
    return "; ".join(stacks)
