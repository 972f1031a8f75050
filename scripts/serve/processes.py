"""Which processes belong to a run directory, and how to end just those.

Every process of a server inherits an environment variable that names its run directory; that mark survives the death
of its parent, so orphaned ranks are found too. Looks at processes of this user only.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "DSSERVE_RUN_DIR"


def find_marked(run_dir: Path) -> list[psutil.Process]:
    """Live processes that carry the mark of `run_dir`, this process and its ancestors left out."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    user = os.getuid()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid in own or process.uids().real != user or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(run_dir):
                found.append(process)
    return found


def describe(process: psutil.Process) -> str:
    """Role of a server's process for people: `TorchServe`, `torchrun`, `rank` or the program's name."""
    with suppress(psutil.Error):
        command = process.cmdline()
        if any("org.pytorch.serve.ModelServer" in word for word in command):
            return "TorchServe"
        # torchrun's own command line names the worker script too
        if any(os.path.basename(word) == "torchrun" for word in command[:2]):
            return "torchrun"
        if any(word.endswith("model_service_worker.py") for word in command):
            return f"rank {process.environ().get('LOCAL_RANK', '?')}"
        return process.name()
    return "gone"


def end_all(run_dir: Path, grace_s: float) -> int:
    """Ask TorchServe to stop, give its processes `grace_s`, kill what is left. Returns how many had to be killed."""
    for process in find_marked(run_dir):
        if describe(process) == "TorchServe":
            with suppress(psutil.Error):
                process.terminate()
    deadline = time.monotonic() + grace_s
    while (left := find_marked(run_dir)) and time.monotonic() < deadline:
        if not any(describe(process) == "TorchServe" for process in left):
            for process in left:  # the server is gone: nobody else will end its workers
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)
    return len(left)
