"""What operators do with a server: probe it, replace its model under load, open it to others, drain and stop it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.pack.archive import Choice, package
from scripts.serve import health, processes, server
from scripts.serve.rollout import Manager, RolloutError, roll_out
from scripts.serve.run_dir import HOST, Ports, RunDir
from scripts.serve.tokens import Kind, rotate
from tests.conftest import ROOT
from tests.e2e.conftest import Served, free_ports, parse, serve
from tests.support.scrape import Scrape

BODY = {"prompt": "The capital of France is", "max_new_tokens": 6}
LONG = {"prompt": "Once upon a time", "max_new_tokens": 150}
CHOICE = Choice(tp="2", device="cpu", dtype="fp32")
SMALL = {"max_model_len": 1024}  # two servers fit beside each other


def probe(served: Served, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "scripts.serve.health",
        "--name",
        served.record.name,
        "--port",
        str(served.record.port),
    ]
    command += ["--key-file", str(served.run.key_file), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_probe_of_a_server_that_answers(fp32: Served) -> None:
    done = probe(fp32, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == "ready" and found["canary_ms"] > 0


def test_the_probe_of_nothing() -> None:
    ports = free_ports()
    assert health.check(ports, "smollm2").state is health.State.DEAD


def test_the_probe_of_a_model_that_is_not_there(fp32: Served) -> None:
    found = health.check(Ports(fp32.record.port), "other")
    assert found.state is health.State.DEAD and "404" in found.detail


@pytest.mark.long
def test_logs_do_not_grow_with_the_tokens(fp32: Served) -> None:
    """A text of 400 tokens writes as many lines as one of 4."""

    def grown(tokens: int) -> dict[str, int]:
        before = {path: path.stat().st_size for path in fp32.run.logs.glob("*.log")}
        body = {"prompt": "Once upon a time", "max_new_tokens": tokens}
        events = parse(fp32.events(body))
        assert events[-1]["usage"]["completion_tokens"] == tokens
        time.sleep(0.5)
        return {path.name: path.stat().st_size - before.get(path, 0) for path in fp32.run.logs.glob("*.log")}

    few, many = grown(4), grown(400)
    assert many["ts_log.log"] <= few["ts_log.log"] + 200
    assert sum(many.values()) < sum(few.values()) + 400


@pytest.fixture(scope="module")
def opened(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that other machines could reach, with version 1.0."""
    folder = tmp_path_factory.mktemp("opened")
    archive = package("opened", str(smollm2), CHOICE, model_store=folder / "store", handler=SMALL)
    served = serve(folder / "run", "opened", archive, host="0.0.0.0")
    yield served
    assert server.stop(served.run) == 0


def authorized(served: Served, kind: str = "inference") -> dict[str, str]:
    return {"Authorization": f"Bearer {served.run.token(kind)}"}


def test_every_call_needs_its_token(opened: Served) -> None:
    refused = opened.ask(BODY)
    assert refused.status_code in (400, 401, 403) and "oken" in refused.text
    assert httpx.post(opened.url, json=BODY, headers=authorized(opened), timeout=60).status_code == 200
    management = f"http://{HOST}:{opened.record.port + 1}/models"
    assert httpx.get(management).status_code >= 400
    assert httpx.get(management, headers=authorized(opened)).status_code >= 400
    assert httpx.get(management, headers=authorized(opened, "management")).status_code == 200


def test_only_inference_listens_beyond_loopback(opened: Served) -> None:
    listening = {
        connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
        for process in processes.find_marked(opened.run.path)
        if processes.describe(process) == "TorchServe"
        for connection in process.net_connections()
        if connection.status == "LISTEN"
    }
    ports = Ports(opened.record.port)
    assert listening[ports.inference] in ("0.0.0.0", "::")
    assert {listening[port] for port in ports.all() if port in listening and port != ports.inference} == {HOST}


def test_the_key_file_is_its_users_alone(opened: Served) -> None:
    assert stat.S_IMODE(os.stat(opened.run.key_file).st_mode) == 0o600
    keys = json.loads(opened.run.key_file.read_text())
    assert keys["inference"]["key"] not in opened.worker_log() + opened.run.server_log.read_text()


def test_the_probe_takes_its_tokens_from_the_key_file(opened: Served) -> None:
    done = probe(opened)
    assert done.returncode == 0, done.stderr


def test_a_new_token_ends_the_old_one(opened: Served) -> None:
    old = authorized(opened)
    rotate(opened.run, Ports(opened.record.port), Kind.inference)
    assert authorized(opened) != old
    assert httpx.post(opened.url, json=BODY, headers=old, timeout=60).status_code >= 400
    assert httpx.post(opened.url, json=BODY, headers=authorized(opened), timeout=60).status_code == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.mar", "file:///tmp/x.mar", "../x.mar"])
def test_models_come_from_the_model_store_alone(opened: Served, url: str) -> None:
    reply = httpx.post(
        f"http://{HOST}:{opened.record.port + 1}/models",
        params={"url": url}, headers=authorized(opened, "management"), timeout=60,
    )  # fmt: skip
    assert reply.status_code in (400, 403, 404), reply.text


@dataclass
class Caller:
    """Sends requests that name no version, one after the other, until it is told to stop."""

    served: Served
    replies: list[tuple[int, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        headers = authorized(self.served)
        while not self.over.is_set():
            try:
                reply = httpx.post(self.served.url, json=BODY, headers=headers, timeout=120)
                self.replies.append((reply.status_code, reply.text))
            except httpx.HTTPError as error:
                self.replies.append((0, repr(error)))


def versions_in_metrics(served: Served) -> set[str]:
    """Of the workers whose metrics are at the server's port; none while nobody listens there."""
    try:
        scrape = Scrape.at(Ports(served.record.port).metrics)
    except httpx.HTTPError:
        return set()
    return {dict(labels)["model_version"] for name, labels in scrape.values if name == "dsserve:kv_slots"}


@pytest.mark.long
def test_a_rolling_restart_fails_no_request(opened: Served, smollm2: Path) -> None:
    """Three clients ask all the time; a long stream that began with the old version ends in full."""
    manager = Manager(opened.run, opened.record.port)
    archive = package("opened", str(smollm2), CHOICE, "2.0", opened.run.path.parent / "store", SMALL)
    expected = httpx.post(opened.url, json=BODY, headers=authorized(opened), timeout=60).text
    headers, callers = authorized(opened), [Caller(opened) for _ in range(3)]
    scrapes: list[set[str]] = []
    with ThreadPoolExecutor(4) as pool:
        for caller in callers:
            pool.submit(caller.run)
        try:
            left = roll_out(manager, "opened", archive, lambda stage: scrapes.append(versions_in_metrics(opened)))
            sent = len(callers[0].replies)
            while len(callers[0].replies) < sent + 3:
                time.sleep(0.1)
        finally:
            for caller in callers:
                caller.over.set()
    assert left == 0
    assert manager.default_version("opened") == "2.0" and manager.version("opened", "1.0") is None
    # One scrape shows both versions while both live; the new one takes the port over.
    assert scrapes == [{"1.0"}, {"1.0", "2.0"}, {"1.0", "2.0"}]
    deadline = time.monotonic() + 15
    while versions_in_metrics(opened) != {"2.0"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    replies = [reply for caller in callers for reply in caller.replies]
    assert len(replies) > 10
    assert [reply for reply in replies if reply != (200, expected)] == []
    assert httpx.post(opened.url, json=BODY, headers=headers, timeout=60).text == expected
    assert sorted(processes.describe(item) for item in processes.find_marked(opened.run.path)) == [
        "TorchServe", "rank 0", "rank 1", "torchrun",
    ]  # fmt: skip


def test_a_rollout_that_cannot_work_leaves_the_old_version(opened: Served, smollm2: Path) -> None:
    fault = {"model_path": "/no/such/model"}
    archive = package("opened", str(smollm2), CHOICE, "3.0", opened.run.path.parent / "store", fault)
    manager = Manager(opened.run, opened.record.port)
    served_before = manager.default_version("opened")
    with pytest.raises(RolloutError, match="/no/such/model"):
        roll_out(manager, "opened", archive, lambda stage: None)
    assert manager.default_version("opened") == served_before and manager.version("opened", "3.0") is None
    assert httpx.post(opened.url, json=BODY, headers=authorized(opened), timeout=60).status_code == 200


def stream_in(pool: ThreadPoolExecutor, served: Served, body: dict[str, Any]) -> tuple[Any, threading.Event]:
    """A streaming client in a thread: its future text, and an event that is set when it has begun."""
    begun = threading.Event()

    def read() -> str:
        text = ""
        with httpx.stream("POST", served.url, json={**body, "stream": True}, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: ")).get("text", "")
                    begun.set()
        return text

    return pool.submit(read), begun


@pytest.mark.long
def test_drain_by_signal_lets_running_requests_end(smollm2: Path, tmp_path: Path) -> None:
    """`scripts.serve run`, as containers run it: after SIGTERM new requests get 503, running ones their whole text."""
    archive = package("drained", str(smollm2), CHOICE, model_store=tmp_path / "store", handler=SMALL)
    ports, run = free_ports(), RunDir(tmp_path / "run")
    command = [sys.executable, "-m", "scripts.serve", "run", "--run-dir", str(run.path), "--archive", str(archive)]
    command += ["--name", "drained", "--port", str(ports.inference), "--drain-s", "60"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as launcher, ThreadPoolExecutor(2) as pool:
        try:
            deadline = time.monotonic() + 180
            while health.check(ports, "drained").state is not health.State.READY:
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
            record = run.read_record()
            assert record is not None
            served = Served(run, record)
            alone = served.text(LONG)
            text, begun = stream_in(pool, served, LONG)
            assert begun.wait(60)
            launcher.send_signal(signal.SIGTERM)
            while not run.drain_file.exists():
                time.sleep(0.05)
            refused = served.ask(BODY)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["type"] == "server_error"
            assert text.result(timeout=120) == alone
            assert launcher.wait(60) == 0
        finally:
            if launcher.poll() is None:
                launcher.kill()
                server.stop(run)
    assert processes.find_marked(run.path) == [] and not run.drain_file.exists()


@pytest.mark.long
def test_a_second_stop_ends_at_once(smollm2: Path, tmp_path: Path) -> None:
    archive = package("stopped", str(smollm2), CHOICE, model_store=tmp_path / "store", handler=SMALL)
    served = serve(tmp_path / "run", "stopped", archive)
    with ThreadPoolExecutor(2) as pool:
        _, begun = stream_in(pool, served, {**LONG, "max_new_tokens": 1000})
        assert begun.wait(60)
        first = pool.submit(server.stop, served.run, 120.0)
        while not served.run.drain_file.exists():
            time.sleep(0.05)
        time.sleep(1)
        assert not first.done()
        started = time.monotonic()
        assert server.stop(served.run, 120.0) == 0
        assert first.result(timeout=30) in (0, None)
        assert time.monotonic() - started < 25
    assert processes.find_marked(served.run.path) == []
