"""How long each phase of a load takes, and a line in the log now and then while a long one is under way.

Measures and reports only; the limits of a load are the watchdog's.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 10.0
_STATUS = Path("/proc/self/status")


class LoadClock:
    """The phases of one rank's load, in order.

    Args:
        rank: for the log.
        device: whose memory shows how far the load is.
        report_every_s: seconds between two lines of a phase.

    Attributes:
        share_bytes: what this rank will hold of the weights, where it is known.
        seconds: phase -> seconds it took.
        current: the phase that runs or failed; after one has ended, which that was.
    """

    def __init__(self, rank: int, device: torch.device, report_every_s: float = REPORT_EVERY_S) -> None:
        self.share_bytes: int | None = None
        self.seconds: dict[str, float] = {}
        self.current = "start"
        self._rank = rank
        self._device = device
        self._report_every_s = report_every_s
        self._started = time.perf_counter()
        self._memory_before = own_bytes(device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block; phases do not nest, and one that comes twice is added up."""
        self.current = name
        started, over = time.perf_counter(), threading.Event()
        reporter = threading.Thread(target=self._report, args=(name, started, over), name="load-clock", daemon=True)
        reporter.start()
        try:
            yield
            self.current = f"after {name}"
        finally:
            over.set()
            reporter.join()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _report(self, name: str, started: float, over: threading.Event) -> None:
        while not over.wait(self._report_every_s):
            taken = max(0, own_bytes(self._device) - self._memory_before) / 2**30
            of = f" of about {self.share_bytes / 2**30:.1f}" if self.share_bytes else ""
            elapsed = time.perf_counter() - started
            logger.info("[dsserve] rank %d: %s: %.0f s, holds %.1f%s GiB", self._rank, name, elapsed, taken, of)

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self._started

    def summary(self) -> str:
        """`41.0 s (read 0.1, reference 4.0, ...)`."""
        total = self.elapsed
        phases = {**self.seconds, "other": total - sum(self.seconds.values())}
        return f"{total:.1f} s ({', '.join(f'{name} {seconds:.1f}' for name, seconds in phases.items())})"


def own_bytes(device: torch.device) -> int:
    """Bytes that belong to this process alone: on a GPU what torch holds there; else anonymous and shared memory, no
    mapped files."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    found = re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)
    return sum(int(kilobytes) for kilobytes in found) * 1024
