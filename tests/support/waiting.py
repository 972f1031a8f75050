"""Waiting for something that another process or thread does, for so long and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
POLL_S = 0.05


def wait_for(condition: Callable[[], Found], timeout_s: float = 15) -> Found:
    """What `condition` gives, as soon as it holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(POLL_S)
    return found
