"""Lets a server finish what it has begun: new requests are refused with 503, running ones go on, for a while.

TorchServe's listener stays open until the server ends (nothing can close it before). Ends no process (`server`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from scripts.common.web import Unreachable
from scripts.serve import management
from scripts.serve.run_dir import Ports, RunDir

DRAIN_S = 30.0
POLL_S = 0.2
# A request that TorchServe has taken from its queue and not yet handed to rank 0 is seen by neither count.
CALM_POLLS = 3


def raise_flag(run: RunDir) -> bool:
    """From now on rank 0 refuses new requests. False if the flag was up already."""
    try:
        run.drain_file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def requests_left(run: RunDir, version: management.Version) -> int:
    """Requests of one version that wait in TorchServe's queue or are being answered by its worker."""
    if version.worker is None:
        return version.waiting
    running = 0
    with suppress(psutil.Error, OSError, ValueError):
        # TorchServe names one of the ranks; the file is named by their torchrun.
        torchrun = psutil.Process(int(version.worker["pid"])).ppid()
        running = int((run.live / str(torchrun)).read_text())
    return version.waiting + running


def wait_until_calm(count: Callable[[], int | None], timeout_s: float, calm_polls: int = CALM_POLLS) -> int | None:
    """Returns 0 when `count` was 0 on `calm_polls` polls in a row; or what it says when `timeout_s` is over.

    None = unknown, which is never taken for 0.
    """
    deadline, calm = time.monotonic() + timeout_s, 0
    while calm < calm_polls:
        left = count()
        calm = calm + 1 if left == 0 else 0
        if calm < calm_polls:
            if time.monotonic() > deadline:
                return left
            time.sleep(POLL_S)
    return 0


def drain(run: RunDir, ports: Ports, timeout_s: float, is_over: Callable[[], bool] = lambda: False) -> int | None:
    """Refuses new requests and waits for the others.

    Returns how many were left at the end of the time; None where the management port did not say it then.

    Args:
        is_over: asked at every poll; True ends the wait at once (a second signal, a server that is gone).
    """
    token = run.token("management")

    def count() -> int | None:
        if is_over():
            return 0
        try:
            return sum(requests_left(run, version) for version in management.all_versions(ports, token))
        except Unreachable:
            return None

    return wait_until_calm(count, timeout_s)


def cut_text(left: int | None, timeout_s: float) -> str:
    """What to tell of requests that had not ended in time; empty if there were none."""
    if left is None:
        return f"the management port did not answer for {timeout_s:.0f} s: requests that still ran were cut"
    return f"{left} request(s) were cut after {timeout_s:.0f} s" if left else ""
