"""Run directories, the processes that belong to them, and what a worker's log means. No TorchServe is started."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.common.addresses import is_free
from scripts.dev.clean import clean, running
from scripts.serve import processes, server
from scripts.serve.run_dir import BIND_NAME, HOST, SOCKET_FOLDER_BYTES, Ports, Record, RunDir, server_properties
from scripts.serve.worker_log import LogTail, find_error, find_stages
from tests.conftest import ROOT
from tests.support.waiting import wait_for

ARCHIVE = Path("/store/m.mar")
PREFIX = "2026-01-01T00:00:00,000 [INFO ] W-29500-m_1.0-stdout MODEL_LOG - "


def log(text: str) -> list[str]:
    return [PREFIX + line for line in text.splitlines()]


def free_block() -> int:
    """The first of six ports that nobody uses now."""
    return next(port for port in random.sample(range(30000, 39000, 10), 50) if not Ports(port).taken())


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture
def marked(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that carries the mark of tmp_path and ignores SIGTERM."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    environ = {**os.environ, processes.MARK: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_all_ports_follow_from_one() -> None:
    assert Ports(8080).all() == [8080, 8081, 8082, 8083, 8085, 8086]


def test_a_taken_port_is_found(listener: int) -> None:
    assert not is_free(listener)
    assert listener in Ports(listener - 5).taken()


def test_the_server_listens_on_loopback_only() -> None:
    properties = server_properties(Ports(9000), "m", ARCHIVE, {"deviceType": "cpu"})
    addresses = {key: value for key, value in properties.items() if key.endswith("address")}
    assert len(addresses) == 5
    assert all("127.0.0.1" in value for value in addresses.values())
    assert properties["load_models"] == "m=m.mar"
    assert properties["number_of_gpu"] == "0"
    assert "number_of_gpu" not in server_properties(Ports(9000), "m", ARCHIVE, {"deviceType": "gpu"})
    assert properties["max_response_size"] == str(64 * 2**20)
    by_hand = (ROOT / "configs" / "torchserve" / "config.properties").read_text().splitlines()
    stated = dict(line.split("=", 1) for line in by_hand if line and not line.startswith("#"))
    assert stated == {"max_response_size": properties["max_response_size"]}


@pytest.mark.parametrize(("host", "open_to_all"), [("::1", True), ("fd00::7", False), ("::", False)])
def test_an_ipv6_address_reaches_torchserve_as_a_name(host: str, open_to_all: bool) -> None:
    """TorchServe's pattern of an address has no room for colons."""
    properties = server_properties(Ports(9000), "m", ARCHIVE, {}, host)
    assert properties["inference_address"] == f"http://{BIND_NAME}:9000"
    assert f"-Djdk.net.hosts.file={RunDir(Path('/run')).hosts_file.name}" in properties["vmargs"].split()
    assert properties["disable_token_authorization"] == str(open_to_all).lower()
    assert "hosts.file" not in server_properties(Ports(9000), "m", ARCHIVE, {})["vmargs"]


@pytest.mark.parametrize(
    ("host", "word"), [("no.such.name.invalid", "name that resolves"), ("192.0.2.77", "no address of this machine")]
)
def test_a_host_of_no_use_is_told_before_anything_starts(tmp_path: Path, host: str, word: str) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(server.ServerError, match=word):
        server.start(run, "m", make_archive(tmp_path / "m.mar"), Ports(20001), host)
    assert not run.path.exists()


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In TorchServe's place: a program that leaves one behind, says so in the file, and goes on itself."""
    package, started = tmp_path / "fake" / "ts", tmp_path / "started"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    code = "import subprocess, sys, time\nleft = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    (package / "model_server.py").write_text(
        f"{code}open({str(started)!r}, 'w').write(str(left.pid))\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path, launcher: Path, number: signal.Signals) -> None:
    run, archive = RunDir(tmp_path / "run"), make_archive(tmp_path / "m.mar")
    command = [sys.executable, "-m", "scripts.serve", "start", "--run-dir", str(run.path), "--archive", str(archive)]
    with subprocess.Popen(
        [*command, "--name", "m", "--port", str(free_block())], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as start:
        wait_for(launcher.exists, 30)
        assert run.read_record() is not None  # `stop` would find it, whatever became of this start
        assert len(processes.find_marked(run.path)) == 2
        start.send_signal(number)
        assert start.wait(30) == 1
        assert start.stderr is not None and "interrupted" in start.stderr.read()
    assert processes.find_marked(run.path) == [] and run.read_record() is None


def test_a_start_that_was_killed_is_found_by_stop(tmp_path: Path, launcher: Path) -> None:
    run, archive = RunDir(tmp_path / "run"), make_archive(tmp_path / "m.mar")
    command = [sys.executable, "-m", "scripts.serve", "start", "--run-dir", str(run.path), "--archive", str(archive)]
    with subprocess.Popen([*command, "--name", "m", "--port", str(free_block())], cwd=ROOT) as start:
        wait_for(launcher.exists, 30)
        start.kill()
    record = run.read_record()
    assert record is not None and Path(record.temp).is_dir()
    assert server.stop(run, 5.0) == 0
    assert processes.find_marked(run.path) == [] and not Path(record.temp).exists()


@pytest.mark.parametrize(
    ("model", "handler", "expected"),
    [
        ({"max_position_embeddings": 8192}, {}, 2**20),
        ({"n_positions": 1024}, {}, 2**20),
        ({"text_config": {"max_position_embeddings": 131_072}}, {}, 131_072 * 128),
        ({"max_position_embeddings": 131_072}, {"max_model_len": 16_384}, 16_384 * 128),
        ({}, {}, 6_553_500),
        (None, {}, 6_553_500),
    ],
)
def test_the_limit_of_a_body_follows_from_the_context(
    tmp_path: Path, model: dict | None, handler: dict, expected: int
) -> None:
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps(model))
    config = {"handler": {"model_path": str(tmp_path), **handler}}
    assert server_properties(Ports(9000), "m", ARCHIVE, config)["max_request_size"] == str(expected)


def test_a_start_removes_what_a_killed_server_left_elsewhere(tmp_path: Path) -> None:
    run, temp = RunDir(tmp_path / "run"), tmp_path / "elsewhere"
    run.create({})
    (temp / "models").mkdir(parents=True)
    run.write_record(Record(1, "m", 8080, str(temp), 0.0))
    run.create({})
    assert not temp.exists() and run.read_record() is None


def test_a_run_directory_starts_empty_and_keeps_logs(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    temp = run.create({"a": "b"})
    (run.logs / "old.log").write_text("old")
    (temp / "left").write_text("left")
    assert run.create({"a": "b"}) == temp
    assert list(run.logs.iterdir()) == list(temp.iterdir()) == []
    assert run.config_file.read_text() == "a=b\n"
    record = Record(1, "m", 9000, str(temp), 0.0)
    run.write_record(record)
    assert run.read_record() == record
    run.clear(record)
    assert run.read_record() is None
    assert not temp.exists()
    assert run.logs.is_dir()


def test_sockets_find_room_also_below_a_long_path(tmp_path: Path) -> None:
    run = RunDir(tmp_path / ("x" * 120))
    temp = run.create({})
    assert len(str(temp)) <= SOCKET_FOLDER_BYTES
    run.clear(Record(1, "m", 9000, str(temp), 0.0))
    assert not temp.exists()


def make_archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", '{"model": {"configFile": "c.yaml"}}')
        file.writestr("c.yaml", "deviceType: cpu\n")
    return path


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path, listener: int) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(server.ServerError, match=f"port .*{listener}.* in use"):
        server.start(run, "m", make_archive(tmp_path / "m.mar"), Ports(listener))
    assert not run.path.exists()


def test_a_second_server_in_one_run_directory_is_refused(tmp_path: Path, marked: subprocess.Popen[bytes]) -> None:
    with pytest.raises(server.ServerError, match="make stop"):
        server.start(RunDir(tmp_path), "m", make_archive(tmp_path / "m.mar"), Ports(9000))


def test_workers_find_torchrun_and_their_own_folders(tmp_path: Path) -> None:
    config = {"deviceType": "cpu", "handler": {"model_path": "/models/x"}}
    environ = server.worker_environment(RunDir(tmp_path), tmp_path / "tmp", config)
    assert environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environ["TEMP"] == environ["TMPDIR"] == str(tmp_path / "tmp")
    assert environ["LOG_LOCATION"] == environ["METRICS_LOCATION"] == str(tmp_path / "logs")
    assert environ[processes.MARK] == str(tmp_path)
    assert environ["DS_ACCELERATOR"] == "cpu"
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_id_may_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    config = {"deviceType": "gpu", "handler": {"model_path": "org/name"}}
    environ = server.worker_environment(RunDir(tmp_path), tmp_path, config)
    assert "HF_HUB_OFFLINE" not in environ
    assert "DS_ACCELERATOR" not in environ


@pytest.mark.parametrize(
    ("forbidden", "installed", "kept"), [("1", False, True), ("1", True, False), ("", False, False)]
)
def test_bytecode_is_kept_where_each_process_would_compile_torch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forbidden: str, installed: bool, kept: bool
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", forbidden)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    compiled = tmp_path / "torch.pyc"
    monkeypatch.setattr("importlib.util.cache_from_source", lambda path: str(compiled))
    if installed:
        compiled.touch()
    environ = server.worker_environment(RunDir(tmp_path), tmp_path, {})
    assert environ.get("PYTHONPYCACHEPREFIX") == (str(tmp_path / "bytecode") if kept else None)
    assert environ.get("PYTHONDONTWRITEBYTECODE") == (None if kept else forbidden)


def test_bytecode_of_unpacked_archives_goes_with_them(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    temp = run.create({})
    ours, torchs = run.bytecode / str(temp)[1:] / "models/x/handler.pyc", run.bytecode / "usr/lib/torch/x.pyc"
    for file in (ours, torchs):
        file.parent.mkdir(parents=True)
        file.touch()
    run.clear(Record(1, "m", 8080, str(temp), 0.0))
    assert torchs.exists() and not ours.exists()


def test_stop_ends_marked_processes_only(tmp_path: Path, marked: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            assert [process.pid for process in processes.find_marked(tmp_path)] == [marked.pid]
            assert processes.end_all(tmp_path, grace_s=0.5) == 1  # it ignores SIGTERM
            assert not psutil.pid_exists(marked.pid)
            assert processes.find_marked(tmp_path) == []
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_stop_without_a_server_says_so(tmp_path: Path) -> None:
    assert server.stop(RunDir(tmp_path)) is None
    assert "no server runs" in server.status(RunDir(tmp_path))[0]


def test_a_pid_that_went_to_another_process_is_not_the_server(tmp_path: Path) -> None:
    assert not server.is_alive(RunDir(tmp_path), Record(os.getpid(), "m", 9000, "", 0.0))


def test_waiting_ends_when_the_server_is_gone(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    temp = run.create({})
    run.server_log.write_text("first\nthe reason\n")
    with pytest.raises(server.ServerError, match="TorchServe ended: the reason"):
        server.wait_until_ready(run, Record(os.getpid(), "m", 1024, str(temp), 0.0), lambda stage: None, timeout_s=5)


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stages = RunDir(tmp_path / "run"), list[str]()
    temp = run.create({})
    run.model_log.write_text("\n".join(log("[dsserve] loading weights")) + "\n")
    monkeypatch.setattr(server, "is_alive", lambda run, record: True)
    started_s = time.monotonic()
    with pytest.raises(server.ServerError, match=r"not ready after 0 s \(last stage: loading weights\)"):
        server.wait_until_ready(run, Record(1, "m", 1024, str(temp), 0.0), stages.append, timeout_s=0.1)
    assert time.monotonic() - started_s < 5
    assert stages == ["loading weights"]


def test_waiting_ends_with_the_workers_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    temp = run.create({})
    run.model_log.write_text("\n".join(log("dsserve.core.errors.LoadError: ds-config.json: mend it")) + "\n")
    monkeypatch.setattr(server, "TRACEBACK_S", 0.0)
    with pytest.raises(server.ServerError, match=r"could not be loaded: ds-config\.json: mend it"):
        server.wait_until_ready(run, Record(1, "m", 1024, str(temp), 0.0), lambda stage: None)


def test_a_tail_gives_whole_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = LogTail(path)
    assert tail.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert tail.new_lines() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\n\xff\n")
    assert tail.new_lines() == ["two", "\ufffd"]
    assert tail.new_lines() == []


def test_stages_are_announced_without_the_servers_prefix() -> None:
    assert find_stages([*log("[dsserve] sharding"), *log("noise")]) == ["sharding"]


def test_no_error_while_nothing_died() -> None:
    assert find_error(log("Traceback (most recent call last):\n  File x\nValueError: handled")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Backend worker process died.\nTraceback (most recent call last):\n  File x\n"
            "dsserve.core.errors.LoadError: model-config.yaml: key: mend",
            "model-config.yaml: key: mend",
        ),
        (
            "Backend worker process died.\nTraceback (most recent call last):\n  File x\n    y = z\nKeyError: 'z'",
            "KeyError: 'z'",
        ),
        (
            "[rank0]: Traceback (most recent call last):\n[rank1]: Traceback (most recent call last):\n"
            "[rank1]:   File x\n[rank0]:   File x\n[rank0]: RuntimeError: boom\n[rank1]: ConnectionError: peer\n"
            "Backend worker process died.",
            "RuntimeError: boom",
        ),
        (
            "Backend worker process died.\nTraceback (most recent call last):\n  File x\nImportError: no module y\n\n"
            "During handling of the above exception, another exception occurred:\n\n"
            "Traceback (most recent call last):\n  File x\n"
            "ModuleNotFoundError: No module named 'ts.torch_handler.deepspeed_handler'",
            "ImportError: no module y",
        ),
        (
            "Traceback (most recent call last):\n  File x\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
            "the worker died without saying why",
        ),
    ],
)
def test_why_a_worker_died(text: str, expected: str) -> None:
    assert find_error(log(text)) == expected


def test_clean_removes_what_make_made_and_nothing_else(tmp_path: Path, marked: subprocess.Popen[bytes]) -> None:
    for made in ("run/m-8080/logs", "models/smollm2", "models/mine", "handlers/__pycache__", ".venv"):
        (tmp_path / made).mkdir(parents=True)
    (tmp_path / "model-store").mkdir()
    (tmp_path / "model-store" / "m.mar").write_bytes(b"")
    assert running(tmp_path) == []
    clean(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"models", "models/mine", "handlers", ".venv", "model-store"}


def test_a_running_server_is_noticed_before_cleaning(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "m-8080"
    folder.mkdir(parents=True)
    environ = {**os.environ, processes.MARK: str(folder)}
    with subprocess.Popen(["sleep", "60"], env=environ) as process:
        try:
            assert running(tmp_path) == [folder]
        finally:
            process.kill()


def test_a_dead_process_is_described_without_an_error() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            known = psutil.Process(process.pid)
            assert processes.describe(known) == "sleep"
        finally:
            process.kill()
    assert processes.describe(known) == "gone"
