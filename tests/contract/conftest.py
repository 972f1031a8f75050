"""A worker's rank 0, and its clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsserve.worker import live_batch
from tests.contract.rank0 import Worker


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The batch's clock, in seconds; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(live_batch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now
