"""A compilation that was killed stops no later one."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from dsserve.compile_lock import STALE_AFTER_S, compiling, drop_stale_lock


@pytest.fixture
def baton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The builder's lock of the extension `some_op`, whose process is dead."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    lock = tmp_path / "some_op" / "lock"
    lock.touch()
    return lock


def test_a_dead_compilations_lock_is_removed(baton: Path) -> None:
    with compiling("some_op"):
        assert not baton.exists()


def test_others_operations_locks_are_removed_by_age_alone(baton: Path) -> None:
    drop_stale_lock("some_op")
    assert baton.exists()
    then = time.time() - STALE_AFTER_S - 1
    os.utime(baton, (then, then))
    drop_stale_lock("some_op")
    drop_stale_lock("some_op")
    assert not baton.exists()


def _hold(entered: multiprocessing.synchronize.Event) -> None:
    with compiling("some_op"):
        entered.set()
        time.sleep(600)


def test_one_process_compiles_and_a_killed_one_leaves_the_turn(baton: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, second = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(entered,))
    first.start()
    assert entered.wait(30)
    other = context.Process(target=_hold, args=(second,))
    other.start()
    assert not second.wait(0.5)
    baton.touch()  # the first one compiles
    first.kill()
    assert second.wait(30) and not baton.exists()
    other.kill()
    first.join()
    other.join()
