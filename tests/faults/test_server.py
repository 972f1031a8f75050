"""Faults around the ranks: TorchServe itself, its sockets, disks, shared memory, ports and neighbours."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts.serve import health, processes, run_dir, server
from scripts.serve.rollout import Manager
from scripts.serve.run_dir import Ports, RunDir
from tests.conftest import ROOT
from tests.e2e.conftest import free_ports, serve
from tests.faults.conftest import LONG, PROMPT, Victim, make_archive, start_victim, wait_until

pytestmark = pytest.mark.long


def test_the_frontend_is_killed(smollm2: Path, tmp_path: Path, measured: Callable[..., None]) -> None:
    """Everything of it ends by itself, also torchrun, which nobody else would end; the next start finds it clean."""
    victim = start_victim(tmp_path, "killed", smollm2)
    stream = victim.stream(LONG).wait_for_tokens()
    killed_at = time.monotonic()
    psutil.Process(victim.record.pid).kill()
    stream.join(10)
    # A process that is ending has no environment to be found by, and still its ports.
    ports = Ports(victim.record.port)
    gone_s = wait_until(lambda: not victim.roles() and not ports.taken(), 15)
    measured(clients_hear_after=(stream.ended_at or 0) - killed_at, nothing_left_after=time.monotonic() - killed_at)
    assert gone_s < 15
    assert health.check(Ports(victim.record.port), "killed").state is health.State.DEAD
    record = server.start(victim.run, "killed", tmp_path / "store" / "killed.mar", Ports(victim.record.port))
    try:
        server.wait_until_ready(victim.run, record, lambda _: None)
        assert Victim(victim.run, record).text(PROMPT) == victim.expected()
    finally:
        assert server.stop(victim.run) == 0


def test_the_frontend_stalls(victim: Victim) -> None:
    """Nothing can answer; the probe says so in its time; when it goes on, so does everything else."""
    victim.wait_until_served(60)
    stream = victim.stream(LONG).wait_for_tokens()
    frontend = psutil.Process(victim.record.pid)
    frontend.send_signal(signal.SIGSTOP)
    try:
        found = health.check(Ports(victim.record.port), "victim", timeout_s=3)
        assert found.state is health.State.DEAD
    finally:
        frontend.send_signal(signal.SIGCONT)
    count = len(stream.events)
    wait_until(lambda: len(stream.events) > count + 5, 30)
    assert health.check(Ports(victim.record.port), "victim", timeout_s=30).state is health.State.READY


def test_sockets_that_were_deleted(victim: Victim, measured: Callable[..., None]) -> None:
    """Connections live on without their names; the next worker makes its own."""
    victim.wait_until_served(60)
    sockets = list(Path(victim.record.temp).glob(".ts.sock.*"))
    assert sockets
    for path in sockets:
        path.unlink()
    assert victim.text(PROMPT) == victim.expected()
    victim.process("rank 1").kill()
    measured(served_again_after=victim.wait_until_served(120))
    victim.assert_whole()


def test_a_port_in_use(victim: Victim, tmp_path: Path) -> None:
    """Told before anything starts, and the server that has it is not touched."""
    with pytest.raises(server.ServerError, match=f"port .*{victim.record.port}.* in use"):
        serve_on(tmp_path / "run", victim.run.path.parent / "store" / "victim.mar", Ports(victim.record.port))
    assert victim.text(PROMPT) == victim.expected()


def serve_on(folder: Path, archive: Path, ports: Ports) -> None:
    server.start(RunDir(folder), "victim", archive, ports)


def test_a_full_disk_under_the_logs(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of a log line fails; requests do not."""
    template = run_dir.LOG4J_TEMPLATE.read_text()
    for name in ("access_log", "model_log", "ts_log"):
        assert f'fileName="${{logs}}/{name}.log"' in template
        template = template.replace(f'fileName="${{logs}}/{name}.log"', 'fileName="/dev/full"', 1)
    (tmp_path / "log4j2.xml").write_text(template)
    monkeypatch.setattr(run_dir, "LOG4J_TEMPLATE", tmp_path / "log4j2.xml")
    archive = make_archive("fulldisk", smollm2, tmp_path / "store")
    served = serve(tmp_path / "run", "fulldisk", archive)
    victim = Victim(served.run, served.record)
    try:
        for _ in range(3):
            assert victim.text(PROMPT) == victim.expected()
        victim.process("rank 1").kill()
        victim.wait_until_served(120)
    finally:
        assert server.stop(served.run) == 0


@contextmanager
def in_a_room_with(shared_memory_mib: int, model: Path, folder: Path) -> Iterator[Victim]:
    """`scripts.serve run` in a mount namespace whose /dev/shm has this size; ended with SIGTERM as a container is."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody make a mount namespace, so /dev/shm cannot be limited")
    archive, ports, run = make_archive("small", model, folder / "store"), free_ports(), RunDir(folder / "run")
    mount = f"mount -t tmpfs -o size={shared_memory_mib}m tmpfs /dev/shm && exec "
    command = f"'{sys.executable}' -m scripts.serve run --run-dir '{run.path}' --archive '{archive}'"
    command += f" --name small --port {ports.inference} --drain-s 5"
    with subprocess.Popen(["unshare", "-rm", "bash", "-c", mount + command], cwd=ROOT) as launcher:
        try:
            wait_until(lambda: health.check(ports, "small").state is health.State.READY or launcher.poll(), 180)
            assert launcher.poll() is None
            record = run.read_record()
            assert record is not None
            yield Victim(run, record)
        finally:
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(60) == 0
    assert processes.find_marked(run.path) == []


def test_a_small_shared_memory(smollm2: Path, tmp_path: Path) -> None:
    """As in a container with Docker's default of 64 MB: the sums go over gloo, which the log says."""
    with in_a_room_with(64, smollm2, tmp_path) as victim:
        assert victim.text(PROMPT) == victim.expected()
        assert "all-reduce over gloo" in victim.worker_log() and "/dev/shm has" in victim.worker_log()


def test_shared_memory_that_fills_up_later(smollm2: Path, tmp_path: Path, measured: Callable[..., None]) -> None:
    """Filled behind the server's back: the worker has its pages already and serves on; a new one finds room in what
    the old one gave back, or sums over gloo."""
    with in_a_room_with(200, smollm2, tmp_path) as victim:
        assert victim.text(PROMPT) == victim.expected()
        room = Path("/proc", str(victim.process("rank 0").pid), "root/dev/shm")
        with suppress_no_space(), (room / "filler").open("wb") as file:
            while True:
                file.write(b"\1" * 2**20)
        assert shutil.disk_usage(room).free < 2**20
        ranks = [victim.process("rank 0"), victim.process("rank 1")]
        long_prompt = {"prompt": "word " * 500, "max_new_tokens": 2}  # larger sums than any before
        assert victim.ask(long_prompt).status_code == 200
        assert victim.text(PROMPT) == victim.expected()
        assert all(rank.is_running() for rank in ranks)
        victim.process("rank 1").kill()
        measured(served_again_after_a_kill=victim.wait_until_served(120))


@contextmanager
def suppress_no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def test_stop_by_hand_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    """After `make stop` no process, no socket, no temporary file, no shared memory; the logs stay."""
    victim = start_victim(tmp_path, "leaver", smollm2)
    assert server.stop(victim.run) == 0
    assert not victim.roles() and not Path(victim.record.temp).exists()
    assert [name for name in os.listdir("/dev/shm") if "deepspeed" in name] == []
    assert sorted(path.name for path in victim.run.path.iterdir()) == ["config.properties", "log4j2.xml", "logs"]


def test_two_models_on_one_server_and_one_is_killed(
    smollm2: Path, tmp_path: Path, measured: Callable[..., None]
) -> None:
    """The other one's stream goes on and ends with its right text; the killed one comes back by itself."""
    victim = start_victim(tmp_path, "first", smollm2, max_model_len=512)
    try:
        manager = Manager(victim.run, victim.record.port)
        manager.register(make_archive("second", smollm2, tmp_path / "store", max_model_len=512), "second")
        manager.wait_until_ready("second", "1.0", 240)
        body = {"prompt": "The history of the lighthouse begins", "max_new_tokens": 100}
        alone = victim.text(body)
        stream = victim.stream(body).wait_for_tokens()
        second = manager.version("second", "1.0")
        assert second is not None and second.worker is not None
        psutil.Process(second.worker["pid"]).kill()
        killed_at = time.monotonic()
        events = stream.join().events
        assert "".join(json.loads(event)["text"] for event in events[:-1]) == alone
        manager.wait_until_ready("second", "1.0", 240)
        measured(second_served_again_after=time.monotonic() - killed_at)
        assert victim.text(PROMPT) == victim.expected()
    finally:
        assert server.stop(victim.run) == 0
