"""The wall clock jumps by a day and back under TorchServe and its ranks, by a library that is loaded before libc."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from scripts.serve import health, processes, server
from scripts.serve.run_dir import Ports
from tests.faults.conftest import LONG, PROMPT, Victim, start_victim

pytestmark = pytest.mark.long

SHIM = Path(__file__).with_name("clock_shim.c")
DAY_S = 24 * 3600


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the clock of what is started from now on to so many seconds beside the real one, again and again."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the library that moves the clock")
    library, offset = tmp_path / "clock_shim.so", tmp_path / "offset"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SHIM], check=True)

    def set_offset(seconds: int) -> None:
        with offset.open("r+b" if offset.exists() else "w+b") as file:  # in place: it is mapped
            file.write(struct.pack("=q", seconds))

    set_offset(0)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_OFFSET_FILE", str(offset))
    return set_offset


@pytest.fixture
def served(smollm2: Path, tmp_path: Path, jump: Callable[[int], None]) -> Iterator[Victim]:
    victim = start_victim(tmp_path, "clock", smollm2, collective_timeout=30.0)
    yield victim
    assert server.stop(victim.run) == 0


def days_off(victim: Victim) -> list[int]:
    """By how many days the clocks of rank 0 and of TorchServe differ from ours."""
    body = {"prompt": "Hello", "max_tokens": 1}
    created = httpx.post(f"{victim.base_url}/completions", json=body, timeout=60).json()["created"]
    logged = (victim.run.logs / "access_log.log").read_text(encoding="utf-8").splitlines()[-1]
    torchserve = time.mktime(time.strptime(logged[:19], "%Y-%m-%dT%H:%M:%S"))
    return [round((clock - time.time()) / DAY_S) for clock in (created, torchserve)]


def test_a_jump_of_the_wall_clock_ends_nothing(served: Victim, jump: Callable[[int], None]) -> None:
    """Forward and back, in mid-stream and idle: the same processes, whole streams, the right text."""
    body = {**LONG, "max_new_tokens": 60}
    alone, before = served.text(body), {item.pid for item in processes.find_marked(served.run.path)}
    assert days_off(served) == [0, 0]
    for days in (1, -1, 0):
        stream = served.stream(body).wait_for_tokens()
        jump(days * DAY_S)
        events = stream.join(180).events
        assert events[-1] == "[DONE]" and stream.error is None
        assert served.text(body) == alone and served.text(PROMPT) == served.expected()
        assert days_off(served) == [days, days]
        assert health.check(Ports(served.record.port), "clock", timeout_s=30).state is health.State.READY
        time.sleep(3)  # the watchdog's looks
    assert {item.pid for item in processes.find_marked(served.run.path)} == before
    assert "ending the rank" not in served.worker_log()
