"""The drain flag and the number of live requests, as rank 0 sees and writes them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dsserve.worker.control import ControlFiles


def test_the_flag_is_seen_when_it_is_raised_and_taken_down(tmp_path: Path) -> None:
    control = ControlFiles(tmp_path, 1)
    assert not control.is_draining()
    (tmp_path / "drain").touch()
    assert control.is_draining()
    (tmp_path / "drain").unlink()
    assert not control.is_draining()


def test_the_number_of_requests_can_be_read_at_any_time(tmp_path: Path) -> None:
    control = ControlFiles(tmp_path, os.getpid())
    file = tmp_path / "live" / str(os.getpid())
    assert int(file.read_text()) == 0
    for requests in (12345, 7, 0):
        control.report(requests)
        assert int(file.read_text()) == requests


def test_workers_that_are_gone_leave_no_file(tmp_path: Path) -> None:
    ControlFiles(tmp_path, 2**22 + 1)
    ControlFiles(tmp_path, os.getpid())
    assert [path.name for path in (tmp_path / "live").iterdir()] == [str(os.getpid())]


def test_a_server_without_our_scripts_never_drains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DSSERVE_RUN_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    control = ControlFiles.from_env()
    control.report(3)
    assert not control.is_draining() and not list(tmp_path.iterdir())


def test_a_run_directory_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "live").write_text("a file where the folder should be")
    ControlFiles(tmp_path, 1).report(3)


def test_both_cost_little(tmp_path: Path) -> None:
    control, started = ControlFiles(tmp_path, 1), time.perf_counter()
    for _ in range(10_000):
        control.is_draining()
        control.report(3)
    assert (time.perf_counter() - started) / 10_000 < 50e-6
