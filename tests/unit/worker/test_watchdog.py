"""The watchdog and the parents it looks at: real processes, no torch."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsserve.parallel.parent_watch import Parents, parent_of
from tests.support.waiting import wait_for

HANDLERS = Path(__file__).resolve().parents[3] / "handlers"
ENVIRON = {**os.environ, "PYTHONPATH": str(HANDLERS)}


def run(code: str) -> tuple[int, str, float]:
    """Exit code, log and seconds of a program that uses a watchdog `dog`."""
    head = "import logging, time; logging.basicConfig(format='%(message)s')\n"
    head += "from dsserve.worker.watchdog import Watchdog\n"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=ENVIRON, capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stderr, time.monotonic() - started


def test_an_overrun_ends_the_process_and_says_where_it_hangs() -> None:
    code = """
def hang(prompt):
    time.sleep(20)
with Watchdog(3).start().limit(0.2, "a step"):
    hang("the text of a user")
"""
    status, log, seconds = run(code)
    assert status == 1 and seconds < 5
    lines = log.splitlines()
    assert len(lines) == 1
    assert "rank 3: a step takes longer than 0.2 s" in lines[0] and "(hang)" in lines[0]
    assert "the text of a user" not in log


def test_a_block_in_time_ends_nothing_and_time_between_blocks_is_free() -> None:
    code = """
dog = Watchdog(0).start()
for _ in range(3):
    with dog.limit(0.3, "a step"):
        time.sleep(0.15)
    time.sleep(0.4)
"""
    assert run(code)[:2] == (0, "")


def test_a_block_that_raises_is_not_counted_on() -> None:
    code = """
dog = Watchdog(0).start()
try:
    with dog.limit(0.2, "a step"):
        raise ValueError
except ValueError:
    time.sleep(0.6)
"""
    assert run(code)[:2] == (0, "")


def test_an_end_that_was_ordered_comes() -> None:
    status, _, seconds = run("Watchdog(0).start().end_in(0.2); time.sleep(20)")
    assert status == 1 and seconds < 5


def test_a_limit_costs_little() -> None:
    from dsserve.worker.watchdog import Watchdog

    dog, started = Watchdog(0), time.perf_counter()
    for _ in range(10_000):
        with dog.limit(1.0, "a step"):
            pass
    assert (time.perf_counter() - started) / 10_000 < 20e-6


RANK = """
import os, sys, time
from dsserve.parallel.parent_watch import Parents, die_with_parent
from dsserve.worker.watchdog import Watchdog
if sys.argv[1] == "kernel":
    die_with_parent()
else:
    Watchdog(0, Parents.now()).start()
open(sys.argv[2], "w").write(str(os.getpid()))
time.sleep(60)
"""
# Starts the rank as torchrun does, and waits for it.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])"
SERVER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], 'torchrun', *sys.argv[2:]])"


# The kernel's signal is of the parent alone: a dead server is the watchdog's affair.
@pytest.mark.parametrize(("line", "victim"), [("kernel", "launcher"), ("watchdog", "launcher"), ("watchdog", "server")])
def test_no_rank_outlives_its_parents(tmp_path: Path, line: str, victim: str) -> None:
    script, pid_file = tmp_path / "rank.py", tmp_path / "pid"
    script.write_text(RANK)
    command = [sys.executable, "-c", SERVER, LAUNCHER, str(script), line, str(pid_file)]
    server = subprocess.Popen(command, env=ENVIRON | {"TORCHELASTIC_RUN_ID": "x"})
    wait_for(lambda: pid_file.is_file() and pid_file.read_text())
    rank = psutil.Process(int(pid_file.read_text()))
    launcher = rank.parent()
    assert launcher is not None and launcher.ppid() == server.pid
    killed_at = time.monotonic()
    os.kill(server.pid if victim == "server" else launcher.pid, signal.SIGKILL)
    wait_for(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)
    assert time.monotonic() - killed_at < 3
    wait_for(lambda: not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE)
    server.wait(timeout=10)


def test_a_rank_whose_torchrun_is_dead_already_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("from dsserve.parallel.parent_watch import die_with_parent; die_with_parent(); print('lives')")
    done = subprocess.run(
        [sys.executable, str(script)],  # its parent is pytest, no torchrun
        env=ENVIRON | {"TORCHELASTIC_RUN_ID": "x"}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")


def test_the_parent_of_a_process_with_an_odd_name() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None
    assert Parents.now().lost() is None


def test_no_time_limit_hangs_on_the_wall_clock() -> None:
    """A clock that is set forward or back must end nothing: only file ages and what is shown to others may read it."""
    readers = {
        path.name
        for path in HANDLERS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now")
    }
    of_files = {"cleanup.py", "compile_lock.py", "weight_source.py"}
    assert readers <= of_files | {"served.py", "reply.py", "metrics.py", "tracing.py"}


def test_a_jump_of_the_wall_clock_ends_nothing() -> None:
    code = """
import itertools
jumps = itertools.count(0, 86400)
time.time = lambda: float(next(jumps))
dog = Watchdog(0).start()
with dog.limit(5, "a step"):
    time.sleep(0.5)
"""
    assert run(code)[:2] == (0, "")
