"""Drain, health probe, tokens and the soak's judgement, without a server."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import typer

from scripts.common.addresses import is_loopback
from scripts.common.web import Unreachable
from scripts.dev import audit
from scripts.reliability import soak
from scripts.reliability.soak_faults import Sample
from scripts.reliability.soak_load import Client, Reference, Tally
from scripts.serve import drain, health, server
from scripts.serve.ask import main as ask_main
from scripts.serve.management import Version
from scripts.serve.rollout import Manager, RolloutError, archive_version
from scripts.serve.run_dir import HOST, Ports, Record, RunDir, server_properties

TEXT = Reference("prompt", 4, "one two three")


def test_the_flag_is_raised_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert drain.raise_flag(run) and run.drain_file.exists()
    assert not drain.raise_flag(run)


def test_a_new_start_forgets_the_flag_and_the_tokens(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    drain.raise_flag(run)
    run.key_file.write_text('{"inference": {"key": "old"}}')
    assert run.token("inference") == "old"
    run.create({})
    assert not run.drain_file.exists() and run.token("inference") is None


def test_waiting_and_running_requests_are_counted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.live.mkdir()
    parent = psutil.Process().ppid()
    version = Version("m", "1.0", 3, {"pid": os.getpid(), "status": "READY"})
    assert drain.requests_left(run, version) == 3  # the worker has written nothing yet
    (run.live / str(parent)).write_text("       4\n")
    assert drain.requests_left(run, version) == 7
    assert drain.requests_left(run, Version("m", "1.0", 2, None)) == 2


def test_calm_is_several_zeros_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_S", 0.0)
    counts = iter([2, 0, 0, 1, 0, 0, 0])
    assert drain.wait_until_calm(lambda: next(counts), 60, calm_polls=3) == 0
    assert list(counts) == []
    assert drain.wait_until_calm(lambda: 5, 0.01) == 5


def test_a_second_signal_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    monkeypatch.setattr(drain.management, "all_versions", lambda ports, token: [Version("m", "1.0", 1, None)])
    signals = iter([False, False, False, True, True, True])
    started = time.monotonic()
    assert drain.drain(RunDir(tmp_path), Ports(8080), 60, lambda: next(signals)) == 0
    assert time.monotonic() - started < 5 and list(signals) == []
    assert drain.drain(RunDir(tmp_path), Ports(8080), 0.05) == 1


def test_a_management_port_that_does_not_answer_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    with socket.socket() as closed:
        closed.bind((HOST, 0))  # bound, not listening: refused
        ports = Ports(closed.getsockname()[1] - 1)
        started = time.monotonic()
        assert drain.drain(RunDir(tmp_path), ports, 0.3) is None
    assert time.monotonic() - started >= 0.3
    assert "did not answer" in drain.cut_text(None, 0.3) and drain.cut_text(0, 1) == ""
    # It answers again, and is asked again.
    answers = iter([Unreachable("busy"), [Version("m", "1.0", 2, None)], Unreachable("busy"), *[[]] * drain.CALM_POLLS])

    def all_versions(ports: Ports, token: str | None) -> list[Version]:
        answer = next(answers)
        if isinstance(answer, Unreachable):
            raise answer
        return answer

    monkeypatch.setattr(drain.management, "all_versions", all_versions)
    assert drain.drain(RunDir(tmp_path), ports, 60) == 0
    assert list(answers) == []


@pytest.mark.parametrize("refusal", [(401, {"message": "token"}), (500, "x")])
def test_a_refusal_is_no_end_either(torchserve: Ports, tmp_path: Path, refusal: Any) -> None:
    """A token that was changed, say: TorchServe answers, and does not tell."""
    Answers.replies = {"/models?limit=1000": refusal, "/models/m/1.0": refusal}
    assert drain.drain(RunDir(tmp_path), torchserve, 0.3) is None
    assert Manager(RunDir(tmp_path), torchserve.inference).requests_left("m", "1.0") is None


def test_what_a_drain_could_not_learn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = RunDir(tmp_path), list[str]()
    run.write_record(Record(os.getpid(), "m", 9000, str(tmp_path / "tmp"), 0.0))
    monkeypatch.setattr(server, "is_alive", lambda run, record: True)
    monkeypatch.setattr(drain, "drain", lambda *_: None)
    assert server.stop(run, 3.0, tell=told.append) == 0
    assert told == ["the management port did not answer for 3 s: requests that still ran were cut"]


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers as TorchServe and a handler would: by path, as the test says."""

    replies: dict[str, tuple[int, Any]]

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply()

    def _reply(self) -> None:
        status, body = self.replies[self.path]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def bound() -> str:
    """The address that inference is bound to."""
    return HOST


@pytest.fixture
def torchserve(bound: str) -> Iterator[Ports]:
    """Management on loopback and inference on `bound`, on two ports in a row."""
    while True:
        inference = http.server.ThreadingHTTPServer((bound, 0), Answers)
        try:
            management = http.server.ThreadingHTTPServer((HOST, inference.server_port + 1), Answers)
            break
        except OSError:
            inference.server_close()
    servers = (inference, management)
    for listener in servers:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield Ports(inference.server_port)
    for listener in servers:
        listener.shutdown()
        listener.server_close()


def model(status: str | None) -> list[dict[str, Any]]:
    return [{"modelVersion": "1.0", "workers": [{"status": status}] if status else []}]


@pytest.mark.parametrize(
    ("described", "canary", "state", "word"),
    [
        ((200, model("READY")), (200, {"text": "a"}), health.State.READY, "answers"),
        (
            (200, model("READY")),
            (503, {"error": {"message": "shutting down"}}),
            health.State.NOT_READY,
            "shutting down",
        ),
        ((200, model("READY")), (503, {"code": 503, "message": "no worker"}), health.State.NOT_READY, "no worker"),
        ((200, model("READY")), (500, {}), health.State.NOT_READY, "500"),
        ((200, model("UNLOADED")), None, health.State.NOT_READY, "UNLOADED"),
        ((200, model(None)), None, health.State.NOT_READY, "missing"),
        ((404, {"message": "not found"}), None, health.State.DEAD, "404"),
    ],
)
def test_what_the_probe_says(torchserve: Ports, described: Any, canary: Any, state: health.State, word: str) -> None:
    Answers.replies = {"/models/m": described, "/predictions/m": canary}
    found = health.check(torchserve, "m", timeout_s=5)
    assert found.state is state and word in found.detail
    assert (found.canary_ms is not None) == (state is health.State.READY)
    assert json.loads(found.to_json())["state"] == state.name.lower()


@pytest.mark.parametrize("bound", ["127.0.0.2"])
def test_inference_is_asked_where_it_is_bound_and_management_on_loopback(torchserve: Ports, bound: str) -> None:
    Answers.replies = {"/models/m": (200, model("READY")), "/predictions/m": (200, {"text": "a"})}
    assert health.check(torchserve, "m", timeout_s=5, host=bound).state is health.State.READY
    elsewhere = health.check(torchserve, "m", timeout_s=5)
    assert elsewhere.state is health.State.NOT_READY and "gave no token" in elsewhere.detail


@pytest.mark.parametrize("bound", ["127.0.0.2"])
def test_the_command_lines_take_the_address_from_the_record(
    torchserve: Ports, bound: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Answers.replies = {"/models/m": (200, model("READY")), "/predictions/m": (200, {"text": "Tokyo"})}
    RunDir(tmp_path).write_record(Record(1, "m", torchserve.inference, str(tmp_path), 0.0, bound))
    port = torchserve.inference
    ask_main("q", "m", port, 8, HOST, tmp_path, None)
    printed = capsys.readouterr()
    assert printed.out == "Tokyo\n" and f"curl http://{bound}:{port}/predictions/m" in printed.err
    with pytest.raises(typer.Exit) as left:
        health.main("m", port, HOST, tmp_path, None, 5.0, False, False)
    assert left.value.exit_code == 0
    assert Manager(RunDir(tmp_path), port).host == bound


@pytest.mark.parametrize(
    ("host", "open_to_all"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.0.0.9", "localhost", "LocalHost", "::ffff:127.0.0.1")],
        *[(host, False) for host in ("0.0.0.0", "127.example.org", "localhost.example.org", "::ffff:10.0.0.1")],
    ],
)
def test_tokens_are_asked_for_beyond_loopback(host: str, open_to_all: bool) -> None:
    properties = server_properties(Ports(9000), "m", Path("/store/m.mar"), {}, host)
    assert is_loopback(host) is open_to_all
    assert properties["disable_token_authorization"] == str(open_to_all).lower()
    if ":" not in host:
        assert properties["inference_address"] == f"http://{host}:9000"
    assert all(HOST in properties[key] for key in ("management_address", "metrics_address", "grpc_inference_address"))
    assert int(properties["token_expiration_min"]) > 60


def test_the_version_of_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "m.mar"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", '{"model": {"modelVersion": "2.0"}}')
    assert archive_version(archive) == "2.0"
    archive.write_text("no archive")
    with pytest.raises(RolloutError, match="make mar VERSION"):
        archive_version(archive)


def sse(*events: str) -> str:
    return "".join(f"data: {event}\n\n" for event in events)


STALL = '{"error":{"message":"restarting","type":"server_error","param":null}}'


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (httpx.Response(200, text=sse('{"text":"one "}', '{"text":"two three"}', "[DONE]")), "right"),
        (httpx.Response(200, text=sse('{"text":"one "}', '{"text":"2"}', "[DONE]")), "wrong"),
        (httpx.Response(200, text=sse('{"text":"one two three"}')), "wrong"),  # the end is missing
        (httpx.Response(200, text=sse('{"text":"one "}', STALL, "[DONE]")), "clean error"),
        (httpx.Response(200, text=sse('{"text":"1"}', STALL, "[DONE]")), "wrong"),
        (httpx.Response(503, json={"error": {"message": "x"}}), "clean error"),
        (httpx.Response(503, json={"code": 503, "message": "x"}), "clean error"),
        (httpx.Response(503, text="x"), "wrong"),
        (httpx.Response(400, json={"error": {"message": "x"}}), "wrong"),  # the request was right
    ],
)
def test_the_soak_judges_streams(monkeypatch: pytest.MonkeyPatch, reply: httpx.Response, expected: str) -> None:
    over = threading.Event()
    over.set()  # no pauses
    client = Client("http://x", [TEXT], Tally(), over, 0)

    class Stream:
        def __enter__(self) -> httpx.Response:
            return reply

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(httpx, "stream", lambda *_, **__: Stream())
    assert client._stream(TEXT)[0] == expected


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [(200, {"text": "one two three"}, "right"), (200, {"text": "one"}, "wrong"), (200, {"error": {}}, "clean error")],
)
def test_the_soak_judges_json(monkeypatch: pytest.MonkeyPatch, status: int, answer: Any, expected: str) -> None:
    client = Client("http://x", [TEXT], Tally(), threading.Event(), 0)
    monkeypatch.setattr(httpx, "post", lambda *_, **__: httpx.Response(status, json=answer))
    assert client._json(TEXT)[0] == expected


def test_growth_is_found() -> None:
    first = Sample({"rank 0": 500.0, "TorchServe": 300.0}, {"rank 0": 30, "TorchServe": 100}, 0, 2, 1)
    assert soak.grown(first, first) == []
    much = 501.0 + soak.GROWTH_MIB["rank 0"]
    last = Sample({"rank 0": much, "TorchServe": 400.0}, {"rank 0": 31, "TorchServe": 400}, 1, 3, 1)
    found = " ".join(soak.grown(first, last))
    for word in ("rank 0: 500", "400 open files", "/dev/shm", "sockets"):
        assert word in found
    assert "TorchServe: 300" not in found
    report = {"failed": [], "wrong": [], "growth": [], "outcomes": Counter(right=5)}
    assert soak.is_passed(report)
    assert not soak.is_passed(report | {"failed": ["not served again"]})
    assert not soak.is_passed(report | {"wrong": ["x"]}) and not soak.is_passed(report | {"outcomes": {}})


def test_the_audit_reads_every_exact_version(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "# head\na==1\nb==2; python_version < '3.11'\nb==3; python_version >= '3.11'\nc>=4\n"
    assert audit.exact_versions(lines) == ["a==1", "b==2", "b==3"]
    files: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        files.append(Path(command[command.index("--requirement") + 1]).read_text())
        return type("Done", (), {"returncode": len(files) - 1})()

    monkeypatch.setattr(audit.subprocess, "run", run)
    assert audit.audit(["a==1", "b==2", "b==3"]) == 1
    assert files == ["a==1\nb==2\n", "b==3\n"]


def test_an_audit_that_cannot_be_done_is_not_called_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "is_reachable", lambda: False)
    audit.main(if_possible=True)
    assert "NOT audited" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        audit.main(if_possible=False)
