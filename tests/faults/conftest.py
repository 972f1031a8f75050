"""A TorchServe that the fault tests may break: short time limits, faults on demand, and what must be left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from scripts.pack import archive as packaging
from scripts.pack.archive import Choice
from scripts.serve import management, processes, server
from scripts.serve.run_dir import Ports
from tests.e2e.conftest import Served, serve
from tests.support.waiting import wait_for

FAULTY_HANDLER = Path(__file__).with_name("faulty_handler.py")
COLLECTIVE_TIMEOUT_S = 6.0
PROMPT = {"prompt": "Once upon a time", "max_new_tokens": 12}
LONG = {"prompt": "Once upon a time", "max_new_tokens": 2000}


def make_archive(name: str, model: Path, store: Path, **handler: Any) -> Path:
    """SmolLM2 in fp32 with the faulty handler and short limits; `handler` adds to the `handler:` section."""
    limits = {
        "collective_timeout": COLLECTIVE_TIMEOUT_S,
        "max_model_len": 2304,
        "warmup": False,
        "log_format": "json",
        **handler,
    }
    entry, packaging.ENTRY = packaging.ENTRY, os.path.relpath(FAULTY_HANDLER, packaging.ROOT / packaging.HANDLERS)
    try:
        choice = Choice(tp="2", device="cpu", dtype="fp32")
        return packaging.package(name, str(model), choice, model_store=store, handler=limits)
    finally:
        packaging.ENTRY = entry


@dataclass
class Stream:
    """A streaming client in a thread: its events, how it ended and when."""

    events: list[str] = field(default_factory=list)
    error: Exception | None = None
    ended_at: float | None = None

    def start(self, url: str, body: dict[str, Any]) -> Stream:
        self._thread = threading.Thread(target=self._read, args=(url, {**body, "stream": True}), daemon=True)
        self._thread.start()
        return self

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url, json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.error = error
        self.ended_at = time.monotonic()

    def wait_for_tokens(self, count: int = 1) -> Stream:
        wait_until(lambda: len(self.events) >= count or self.ended_at, 60)
        assert self.ended_at is None, (self.events, self.error)
        return self

    def join(self, timeout_s: float = 60) -> Stream:
        self._thread.join(timeout_s)
        assert self.ended_at is not None, "the stream hangs"
        return self


@dataclass(frozen=True)
class Victim(Served):
    """A server that a test may break, and what it must look like again afterwards."""

    def process(self, role: str) -> psutil.Process:
        """The one process of that role: `TorchServe`, `torchrun`, `rank 0`, `rank 1`."""
        (found,) = [item for item in processes.find_marked(self.run.path) if processes.describe(item) == role]
        return found

    def stream(self, body: dict[str, Any]) -> Stream:
        return Stream().start(self.url, body)

    def wait_until_served(self, within_s: float) -> float:
        """Seconds until a request is answered with its right text again."""
        started = time.monotonic()
        while True:
            try:
                response = self.ask(PROMPT, timeout_s=within_s)
                if response.status_code == 200:
                    assert response.json()["text"] == self.expected()
                    return time.monotonic() - started
            except httpx.HTTPError:
                pass
            assert time.monotonic() - started < within_s, f"not served again within {within_s} s"
            time.sleep(0.2)

    def expected(self) -> str:
        """PROMPT's text, as the first server of the session gave it."""
        if "text" not in _EXPECTED:
            _EXPECTED["text"] = self.text(PROMPT)
        return _EXPECTED["text"]

    def assert_whole(self) -> None:
        """Two ranks, one torchrun, one TorchServe; no shared memory left."""
        wait_until(lambda: self.roles() == ["TorchServe", "rank 0", "rank 1", "torchrun"], 60)
        assert [name for name in os.listdir("/dev/shm") if "deepspeed" in name] == []

    def roles(self) -> list[str]:
        return sorted(processes.describe(item) for item in processes.find_marked(self.run.path))

    @contextmanager
    def fault(self, rank: int, what: str) -> Iterator[Path]:
        """A fault of `faulty_handler` on one rank."""
        path = self.run.path / "faults" / str(rank)
        path.parent.mkdir(exist_ok=True)
        path.write_text(what)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


_EXPECTED: dict[str, str] = {}


def wait_until(condition: Callable[[], object], within_s: float) -> float:
    """Seconds until it holds; fails after `within_s`."""
    started = time.monotonic()
    wait_for(condition, within_s)
    return time.monotonic() - started


def start_victim(folder: Path, name: str, model: Path, **handler: Any) -> Victim:
    archive = make_archive(name, model, folder / "store", **handler)
    served = serve(folder / "run", name, archive)
    return Victim(served.run, served.record)


@pytest.fixture(scope="session")
def victim(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One server for all tests that its worker survives or is replaced in: each must leave it whole."""
    served = start_victim(tmp_path_factory.mktemp("victim"), "victim", smollm2)
    served.expected()
    yield served
    server.stop(served.run)
    assert processes.find_marked(served.run.path) == []


def is_ready(served: Served) -> bool:
    return management.is_ready(Ports(served.record.port), served.record.name)


_MEASURED: list[str] = []


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes figures (seconds unless the name says otherwise) for the table at the end of the run."""

    def note(**figures: float) -> None:
        values = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
        _MEASURED.append(f"{request.node.name}: {values}")

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _MEASURED:
        terminalreporter.section("faults: measured, in seconds")
        for line in _MEASURED:
            terminalreporter.line(line)
