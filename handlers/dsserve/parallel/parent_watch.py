"""The processes that this rank must not outlive: torchrun, which started it, and the server, which started torchrun.

The kernel ends a rank with torchrun (`die_with_parent`); `Parents` is the second line, and the only one for a server
that dies and leaves its torchrun. Covers Linux and one host.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# torchrun sets it in its ranks; without it the parent is the server itself.
LAUNCH_VARIABLE = "TORCHELASTIC_RUN_ID"


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies; ends it now where torchrun is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if LAUNCH_VARIABLE in os.environ and not _is_torchrun(os.getppid()):
        os._exit(1)  # it died before the kernel was asked, and somebody else is our parent now


@dataclass(frozen=True)
class Parents:
    """Process ids as they were at the load.

    Attributes:
        launcher: our parent: torchrun, or the server where there is no torchrun.
        server: torchrun's parent; None without torchrun.
    """

    launcher: int
    server: int | None

    @classmethod
    def now(cls) -> Parents:
        launcher = os.getppid()
        return cls(launcher, parent_of(launcher) if LAUNCH_VARIABLE in os.environ else None)

    def lost(self) -> str | None:
        """Who died; None while all live."""
        if os.getppid() != self.launcher:
            return "the process that started this rank"
        if self.server is not None and parent_of(self.launcher) != self.server:
            return "the server"
        return None

    def end_launcher(self) -> None:
        """Kills a torchrun without a server: it would start its ranks once more, for nobody. They die with it."""
        if self.server is not None and os.getppid() == self.launcher:
            os.kill(self.launcher, signal.SIGKILL)


def parent_of(pid: int) -> int | None:
    """The parent's process id; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # pid (name) state ppid ...; the name may hold blanks and parentheses.
    return int(stat.rpartition(b")")[2].split()[1])


def _is_torchrun(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torchrun" in command or b"torch.distributed" in command
