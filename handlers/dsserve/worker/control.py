"""How the scripts and rank 0 speak: two small files in the server's run directory. Rank 0 only; nothing of HTTP.

`drain`: while it exists, new requests are refused. `live/<torchrun's pid>`: the number of requests that rank 0 answers
now, written on each call, so that a script knows when a worker has nothing left to do (TorchServe's management API
names one of the ranks, a child of that torchrun, and the requests that wait). Both are absent for a server that was
started without our scripts.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dsserve.core.environment import RUN_DIR_VARIABLE

DRAIN_FILE = "drain"
LIVE_FOLDER = "live"
_WIDTH = 8


class ControlFiles:
    """Rank 0's end of the two files; a few microseconds a call.

    Args:
        run_dir: the server's run directory; None = nobody drains and nobody asks.
        launcher_pid: torchrun, the parent of all ranks of this worker.
    """

    def __init__(self, run_dir: Path | None, launcher_pid: int) -> None:
        self._drain = str(run_dir / DRAIN_FILE) if run_dir else None
        self._live: int | None = None
        if run_dir:
            with contextlib.suppress(OSError):  # without the file `make stop` waits for its time-out, no more
                folder = run_dir / LIVE_FOLDER
                folder.mkdir(exist_ok=True)
                _forget_dead(folder)
                self._live = os.open(folder / str(launcher_pid), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.report(0)

    @classmethod
    def from_env(cls) -> ControlFiles:
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        return cls(Path(run_dir) if run_dir else None, os.getppid())

    def is_draining(self) -> bool:
        """Whether new requests are to be refused."""
        if self._drain is None:
            return False
        try:
            os.stat(self._drain)
        except OSError:
            return False
        return True

    def report(self, requests: int) -> None:
        """Writes down how many requests are being answered."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._live, b"%*d\n" % (_WIDTH, requests), 0)


def _forget_dead(folder: Path) -> None:
    """Removes the files of workers that are gone; other models of the same server keep theirs."""
    for path in folder.iterdir():
        if not Path("/proc", path.name).exists():
            path.unlink(missing_ok=True)
