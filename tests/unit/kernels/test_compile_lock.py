"""A compilation that was killed stops no later one."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from dsserve.kernels.compile_lock import STALE_AFTER_S, compiling, was_abandoned


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


def test_others_operations_locks_are_removed_when_nothing_moves(baton: Path) -> None:
    """Another program's compilation may live on another host: a file that it writes says so, however old the lock."""
    then = time.time() - STALE_AFTER_S - 1
    os.utime(baton, (then, then))
    part = baton.with_name("part.o")
    part.touch()
    with compiling("some_op", others_compile=True):
        assert baton.exists()
    os.utime(part, (then, then))
    with compiling("some_op", others_compile=True):
        assert not baton.exists()


def test_our_killed_compilation_of_others_operations_is_known_at_once(baton: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    first = context.Process(target=_hold, args=(entered, True))
    first.start()
    assert entered.wait(30)
    baton.touch()
    assert not was_abandoned(baton.parent)
    first.kill()
    first.join()
    assert was_abandoned(baton.parent)
    with compiling("some_op", others_compile=True):
        assert not baton.exists()
    assert not was_abandoned(baton.parent)


def _hold(entered: multiprocessing.synchronize.Event, others_compile: bool = False) -> None:
    with compiling("some_op", others_compile):
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
