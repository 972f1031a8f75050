"""One address for the metrics of all workers: the first one has it, and the next one takes it over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics

from dsserve.core.environment import RUN_DIR_VARIABLE
from dsserve.observability.metrics_server import ADDRESS_VARIABLE, FOLDER, MOST_CONNECTIONS, MetricsEndpoint
from scripts.serve import server
from scripts.serve.run_dir import RunDir
from tests.support.scrape import PROMETHEUS_2, PROMETHEUS_3, Scrape
from tests.support.waiting import wait_for

HOST = "127.0.0.1"
# Another worker: its own version of the same metric.
WORKER = """
import time
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from dsserve.observability.metrics_server import MetricsEndpoint
disable_created_metrics()
registry = CollectorRegistry()
Counter("vllm:prompt_tokens", "Help.", ["model_version"], registry=registry).labels("1.0").inc(3)
MetricsEndpoint.from_env(registry).start()
time.sleep(60)
"""


def make_registry(version: str, count: int) -> CollectorRegistry:
    disable_created_metrics()
    registry = CollectorRegistry()
    Counter("vllm:prompt_tokens", "Help.", ["model_version"], registry=registry).labels(version).inc(count)
    return registry


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def old_worker(port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = {**os.environ, ADDRESS_VARIABLE: f"{HOST}:{port}", RUN_DIR_VARIABLE: str(tmp_path)}
    environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[3] / "handlers")
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=environ)
    wait_for(lambda: listens(port))
    yield worker
    worker.kill()
    worker.wait()


def test_two_workers_are_one_scrape_and_the_second_takes_over(
    old_worker: subprocess.Popen[bytes], port: int, tmp_path: Path
) -> None:
    MetricsEndpoint(make_registry("2.0", 5), HOST, port, tmp_path / FOLDER).start()
    note = tmp_path / FOLDER / str(os.getpid())
    wait_for(note.exists)
    wait_for(lambda: Scrape.at(port).sum("vllm:prompt_tokens_total") == 8)
    both = Scrape.at(port)
    assert both.sum("vllm:prompt_tokens_total", model_version="1.0") == 3
    assert both.text.count("# TYPE") == 1
    private = int(note.read_text())
    os.kill(old_worker.pid, signal.SIGKILL)
    old_worker.wait()
    wait_for(lambda: listens(port))
    wait_for(lambda: not note.exists())
    assert Scrape.at(port).values == {("vllm:prompt_tokens_total", frozenset({("model_version", "2.0")})): 5}
    wait_for(lambda: not listens(private))


def test_notes_of_dead_and_starting_workers_do_no_harm(port: int, tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    dead, half_written = folder / str(2**22 + 1), folder / "1"
    dead.write_text("1")
    half_written.write_text("")
    MetricsEndpoint(make_registry("1.0", 2), HOST, port, folder).start()
    assert Scrape.at(port).sum("vllm:prompt_tokens_total") == 2
    assert not dead.exists() and half_written.exists()


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "text/plain;version=1.0.0", "*/*"])
def test_names_keep_their_colon_whatever_format_is_asked_for(port: int, tmp_path: Path, accept: str) -> None:
    MetricsEndpoint(make_registry("1.0", 2), HOST, port, tmp_path / FOLDER).start()
    assert Scrape.at(port, accept=accept).names() == {"vllm:prompt_tokens_total"}


def test_without_the_scripts_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    assert MetricsEndpoint.from_env(CollectorRegistry()) is None


def test_the_scripts_and_the_handler_mean_the_same(tmp_path: Path) -> None:
    assert server.METRICS_VARIABLE == ADDRESS_VARIABLE
    assert RunDir(tmp_path).metrics_notes == tmp_path / FOLDER


def test_idle_connections_neither_pile_up_nor_stay(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsserve.observability.metrics_server.IDLE_S", 0.5)
    MetricsEndpoint(make_registry("1.0", 4), HOST, port, None).start()
    before = threading.active_count()
    idle = [socket.create_connection((HOST, port), timeout=5) for _ in range(MOST_CONNECTIONS + 8)]
    try:
        wait_for(lambda: threading.active_count() > before)
        assert threading.active_count() <= before + MOST_CONNECTIONS
        wait_for(lambda: threading.active_count() == before)  # all of them were ended
        assert all(connection.recv(1) == b"" for connection in idle)
        assert Scrape.at(port).sum("vllm:prompt_tokens_total") == 4
    finally:
        for connection in idle:
            connection.close()


def test_slow_clients_do_not_keep_prometheus_out(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each place is taken by one who never ends its request."""
    monkeypatch.setattr("dsserve.observability.metrics_server.IDLE_S", 60)
    monkeypatch.setattr("dsserve.observability.metrics_server.LONGEST_S", 60)
    MetricsEndpoint(make_registry("1.0", 4), HOST, port, None).start()
    slow = [socket.create_connection((HOST, port), timeout=5) for _ in range(MOST_CONNECTIONS)]
    try:
        for connection in slow:
            connection.sendall(b"GET /met")
        started = time.monotonic()
        for _ in range(3):
            assert Scrape.at(port).sum("vllm:prompt_tokens_total") == 4
        assert time.monotonic() - started < 5
        assert slow[0].recv(1) == b""  # the oldest left for it
        slow[-1].sendall(b"rics HTTP/1.0\r\n\r\n")
        assert slow[-1].recv(4) == b"HTTP"
    finally:
        for connection in slow:
            connection.close()
    assert "Traceback" not in capsys.readouterr().err


def test_who_sends_byte_by_byte_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsserve.observability.metrics_server.LONGEST_S", 1.0)
    MetricsEndpoint(make_registry("1.0", 4), HOST, port, None).start()
    with socket.create_connection((HOST, port), timeout=0.1) as connection:
        started = time.monotonic()
        while time.monotonic() - started < 10:
            try:
                connection.sendall(b"G")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert 0.5 < time.monotonic() - started < 5


def test_who_reads_nothing_is_ended_and_nothing_is_logged(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page fits into no socket's buffers."""
    monkeypatch.setattr("dsserve.observability.metrics_server.LONGEST_S", 60)
    monkeypatch.setattr("dsserve.observability.metrics_server.IDLE_S", 0.5)
    registry = make_registry("1.0", 4)
    rows = Counter("long", "x" * 2**20, ["name"], registry=registry)
    for number in range(8):
        rows.labels(f"{number}" * 2**20).inc()
    MetricsEndpoint(registry, HOST, port, None).start()
    before = threading.active_count()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect((HOST, port))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(16).startswith(b"HTTP/1.0 200")  # the page is made, and no more of it is taken
        wait_for(lambda: threading.active_count() == before)
    assert "Traceback" not in capsys.readouterr().err
