"""Which server a command means: by run directory, else by port; who is named where that does not say it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from scripts.serve import cli as serve
from scripts.serve import processes
from scripts.serve.find_run import Ambiguous, NotFound, find_run, find_target
from scripts.serve.run_dir import HOST, Record, RunDir

Start = Callable[..., RunDir]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Makes a run directory with a record and a process that carries its mark."""
    started: list[subprocess.Popen[bytes]] = []

    def make(folder: str, name: str, port: int, host: str = HOST, alive: bool = True) -> RunDir:
        run = RunDir(tmp_path / "run" / folder)
        run.path.mkdir(parents=True)
        run.write_record(Record(1, name, port, str(run.path / "tmp"), 0.0, host))
        if alive:
            started.append(subprocess.Popen(["sleep", "60"], env={**os.environ, processes.MARK: str(run.path)}))
        return run

    yield make
    for process in started:
        process.kill()
        process.wait()


def test_the_port_finds_the_server_of_another_model(start: Start, tmp_path: Path) -> None:
    tiny, derived = start("tiny-9010", "tiny", 9010, "127.0.0.2"), tmp_path / "run" / "smollm2-9010"
    start("other-9020", "other", 9020)
    start("dead-9010", "dead", 9010, alive=False)
    assert find_run(derived, 9010, tmp_path / "run") == tiny
    target = find_target("smollm2", 9010, derived, HOST, runs=tmp_path / "run")
    assert target.url == "http://127.0.0.2:9010/predictions/tiny"
    assert find_run(tiny.path, 9999, tmp_path / "run") == tiny  # the directory that was named comes first


def test_those_that_run_are_named(start: Start, tmp_path: Path) -> None:
    runs = tmp_path / "run"
    with pytest.raises(NotFound, match="none runs"):
        find_run(runs / "smollm2-9010", 9010, runs)
    start("tiny-9010", "tiny", 9010)
    with pytest.raises(NotFound, match=r"no server runs in .*or at port 9020.*tiny at 127\.0\.0\.1 port 9010"):
        find_run(runs / "smollm2-9020", 9020, runs)
    start("more-9010", "more", 9010, "127.0.0.2")
    with pytest.raises(Ambiguous, match=r"more at 127\.0\.0\.2 port 9010.*tiny at 127\.0\.0\.1 port 9010"):
        find_run(runs / "smollm2-9010", 9010, runs)


def test_without_a_record_the_given_address_is_asked(tmp_path: Path) -> None:
    target = find_target("m", 9010, tmp_path / "run" / "m", "0.0.0.0", tmp_path / "key", tmp_path / "run")
    assert (target.url, target.key_file) == ("http://127.0.0.1:9010/predictions/m", tmp_path / "key")
    assert find_target("m", 9010, None, "::1").url == "http://[::1]:9010/predictions/m"


def test_stop_of_nothing_succeeds_only_where_nothing_runs_on_the_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.serve.find_run.RUNS", tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        port = other.getsockname()[1]
    serve.stop(tmp_path / "m", port, 0.0)
    with socket.create_server(("127.0.0.2", port)), pytest.raises(typer.Exit) as left:
        serve.stop(tmp_path / "m", port, 0.0)
    assert left.value.exit_code == 1
    assert f"another program listens on port {port}" in capsys.readouterr().err


def test_stop_by_port_ends_that_server_alone(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.serve.find_run.RUNS", tmp_path / "run")
    tiny, other = start("tiny-9010", "tiny", 9010), start("other-9020", "other", 9020)
    serve.stop(tmp_path / "run" / "smollm2-9010", 9010, 0.0)
    assert processes.find_marked(tiny.path) == [] and tiny.read_record() is None
    assert len(processes.find_marked(other.path)) == 1
