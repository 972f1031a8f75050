"""HAProxy's configuration: checked by haproxy itself, and run before small servers of this process that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsserve.protocol.routes import PATHS
from scripts.bench import open_load
from scripts.bench.open_load import CUT, LOST, REFUSED, WHOLE, WRONG, Answer, Load, completion
from scripts.reliability import balancer, failover_report
from scripts.reliability.balancer import Balancer, BalancerError
from scripts.serve.run_dir import HOST

MODEL = "small"
FAST = 15.0


def haproxy_or_skip() -> None:
    try:
        balancer.find_haproxy()
    except BalancerError as error:
        pytest.skip(str(error))


def free_port() -> int:
    """One of two free ports in a row."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind((HOST, 0))
            port = int(one.getsockname()[1])
            try:
                two.bind((HOST, port + 1))
            except OSError:
                continue
            return port


@dataclass
class Fake:
    """A server as the balancer meets it. `mode`: good, full (429), draining (503), silent (closes without a word)."""

    port: int
    mode: str = "good"
    health: int = 200
    asked: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)


@contextmanager
def fake() -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.endswith("/health"):
                self.reply(state.health, {})
            else:
                state.asked.append((self.path, b"", dict(self.headers)))
                self.reply(200, {"path": self.path})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.asked.append((self.path, body, dict(self.headers)))
            if state.mode == "silent":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif state.mode in ("full", "draining"):
                self.reply({"full": 429, "draining": 503}[state.mode], {"error": {}}, {"Retry-After": "1"})
            elif json.loads(body).get("stream"):
                self.stream()
            else:
                self.reply(200, {"port": state.port})

        def stream(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
                state.gate.wait(10)
            self.wfile.write(b"0\r\n\r\n")

        def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as httpd:
        state = Fake(httpd.server_port)
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.gate.set()
            httpd.shutdown()
            thread.join()


@contextmanager
def front(folder: Path, *servers: Fake, **settings: str) -> Iterator[Balancer]:
    haproxy_or_skip()
    addresses = [f"{HOST}:{server.port}" for server in servers]
    with balancer.running(folder, free_port(), MODEL, addresses, **settings) as running:
        yield running


def post(target: Balancer, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{target.url}/v1/completions", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize("settings", [{}, {"ROUTING": "prefix"}, {"API_KEY": "k", "VERSION": "2.0", "SERVER_MAX": "4"}])
def test_haproxy_finds_nothing_wrong(settings: dict[str, str]) -> None:
    haproxy_or_skip()
    addresses = [f"{HOST}:{port}" for port in (9001, 9002, 9003, 9004)]
    assert balancer.lint(balancer.environment(MODEL, addresses, **settings)) == ""


def test_a_missing_server_or_model_is_named() -> None:
    haproxy_or_skip()
    assert "DSSERVE_SERVER_1 is not set" in balancer.lint(balancer.environment(MODEL, []))
    environ = balancer.environment(MODEL, [f"{HOST}:9001"])
    del environ["DSSERVE_MODEL"]
    assert "DSSERVE_MODEL is not set" in balancer.lint(environ)


def test_openais_paths_reach_the_model_and_no_other_does(tmp_path: Path) -> None:
    with fake() as server, front(tmp_path, server, VERSION="3.1") as target:
        for path in PATHS:
            if path.startswith("v1/"):
                reply = httpx.get(f"{target.url}/{path}")
                assert reply.status_code == 200 and reply.json() == {"path": f"/predictions/{MODEL}/3.1/{path}"}
        for path in ("/predictions/small", "/models", "/v1/../models", "/v1/nothing", "/v1", "/"):
            reply = httpx.get(f"{target.url}{path}")
            assert reply.status_code == 404 and reply.json()["error"]["code"] == "unknown_url"
        assert len(server.asked) == sum(path.startswith("v1/") for path in PATHS)
        assert httpx.get(f"{target.url}/health").status_code == 200
        assert "haproxy_server_status" in httpx.get(f"http://{HOST}:{target.port + 1}/metrics").text


def test_a_key_is_asked_for_and_goes_no_further(tmp_path: Path) -> None:
    with fake() as server, front(tmp_path, server, API_KEY="secret key") as target:
        assert post(target, {}).json()["error"]["code"] == "invalid_api_key"
        assert post(target, {}, Authorization="Bearer secret").status_code == 401
        assert server.asked == []
        assert post(target, {}, Authorization="Bearer secret key").status_code == 200
        assert "authorization" not in {name.lower() for name in server.asked[0][2]}


def test_a_clients_request_id_goes_on_and_a_wrong_one_is_replaced(tmp_path: Path) -> None:
    with fake() as server, front(tmp_path, server) as target:
        post(target, {}, **{"x-request-id": "mine-1"})
        post(target, {"secret": "words"}, **{"x-request-id": "two words"})
        ids = [headers["x-request-id"] for _, _, headers in server.asked]
    assert ids[0] == "mine-1" and len(ids[1]) == 36
    log = (tmp_path / "haproxy.log").read_text()
    assert "mine-1" in log and "words" not in log and "/v1/" not in log


def test_a_server_that_comes_back_is_not_flooded_by_what_waited(tmp_path: Path) -> None:
    with fake() as stays, fake() as returns, front(tmp_path, stays, returns, SERVER_MAX="2") as target:
        returns.health = 503
        target.wait_until("s1", True, FAST)
        target.wait_until("s2", False, FAST)
        clients = [threading.Thread(target=post, args=(target, {"stream": True})) for _ in range(16)]
        for client in clients[:12]:
            client.start()
        returns.health = 200
        target.wait_until("s2", True, FAST)
        time.sleep(3)  # a slow start would hand out more each second
        assert (len(stays.asked), len(returns.asked)) == (2, 2)
        for client in clients[12:]:
            client.start()
        time.sleep(1)
        # HAProxy 2.6 does not count what it handed over at the return.
        assert len(stays.asked) == 2 and 2 <= len(returns.asked) <= 4
        stays.gate.set()
        returns.gate.set()
        for client in clients:
            client.join(FAST)
    assert len(stays.asked) + len(returns.asked) == len(clients)


@pytest.mark.parametrize("mode", ["draining", "silent"])
def test_what_a_server_did_not_begin_goes_to_the_other_one(tmp_path: Path, mode: str) -> None:
    """100 kB of prompt too: a request can be sent again only if HAProxy's buffer holds it whole."""
    with fake() as bad, fake() as good, front(tmp_path, bad, good) as target:
        bad.mode = mode
        replies = [post(target, {"prompt": "x" * size}) for size in (1, 1, 1, 100_000)]
        assert [reply.json() for reply in replies] == [{"port": good.port}] * 4
        assert bad.asked != []


def test_a_refusal_for_overload_reaches_the_client(tmp_path: Path) -> None:
    with fake() as server, front(tmp_path, server) as target:
        server.mode = "full"
        reply = post(target, {})
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1" and len(server.asked) == 1


def test_a_server_that_is_not_ready_is_left_out_until_it_is(tmp_path: Path) -> None:
    with fake() as one, fake() as two, front(tmp_path, one, two) as target:
        one.health = 503
        assert target.wait_until("s1", False, FAST) < FAST
        assert {post(target, {}).json()["port"] for _ in range(4)} == {two.port}
        two.health = 503
        target.wait_until("s2", False, FAST)
        assert httpx.get(f"{target.url}/health").status_code == 503
        one.health = 200
        target.wait_until("s1", True, FAST)
        assert post(target, {}).json() == {"port": one.port}


def test_events_pass_one_by_one(tmp_path: Path) -> None:
    with (
        fake() as server,
        front(tmp_path, server) as target,
        httpx.stream("POST", f"{target.url}/v1/completions", json={"stream": True}, timeout=10) as reply,
    ):
        pieces = reply.iter_text()
        assert next(pieces) == 'data: {"choices": []}\n\n'  # the server holds the next one back
        server.gate.set()
        assert "".join(pieces) == "data: [DONE]\n\n"


def test_a_server_gets_no_more_than_its_share_the_others_wait(tmp_path: Path) -> None:
    with fake() as server, front(tmp_path, server, SERVER_MAX="2") as target:
        threads = [threading.Thread(target=post, args=(target, {"stream": True})) for _ in range(5)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + FAST
        while len(server.asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # a third one would have come by now
        asked = len(server.asked)
        server.gate.set()
        for thread in threads:
            thread.join()
        assert (asked, len(server.asked)) == (2, 5)


def test_prompts_that_begin_alike_meet_the_same_server(tmp_path: Path) -> None:
    with fake() as one, fake() as two, front(tmp_path, one, two, ROUTING="prefix") as target:
        ports: dict[int, Counter[int]] = {}
        for user in range(12):
            system = f"You are assistant number {user}. " * 20
            bodies = [{"prompt": f"{system} question {number}"} for number in range(3)]
            ports[user] = Counter(post(target, body).json()["port"] for body in bodies)
        assert all(len(found) == 1 for found in ports.values())
        assert {port for found in ports.values() for port in found} == {one.port, two.port}
        keyed = {post(target, {"prompt": str(n)}, **{"x-prefix-key": "mine"}).json()["port"] for n in range(8)}
        assert len(keyed) == 1


def sse(*events: Any) -> bytes:
    lines = b"".join(
        b"data: %s\n\n" % (event if isinstance(event, bytes) else json.dumps(event).encode()) for event in events
    )
    # Cut in the middle of an event, as a proxy may.
    pieces = (lines[: len(lines) // 2], lines[len(lines) // 2 :])
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece)


def token(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 2}}
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (HEAD + sse(token("a"), token("b", "length"), USAGE, b"[DONE]") + b"0\r\n\r\n", WHOLE),
        (HEAD + sse(token("a"), token("x", "length"), USAGE, b"[DONE]") + b"0\r\n\r\n", WRONG),
        (
            HEAD + sse(token("a", "length"), {**USAGE, "usage": {"completion_tokens": 1}}, b"[DONE]") + b"0\r\n\r\n",
            WRONG,
        ),
        (HEAD + sse(token("a")), CUT),
        (HEAD + sse(token("a"), {"error": {}}, b"[DONE]") + b"0\r\n\r\n", CUT),
        (HEAD, LOST),
        (b"", LOST),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", REFUSED),
    ],
)
def test_how_an_answer_ended_is_told_apart(reply: bytes, outcome: str) -> None:
    async def run() -> list[Answer]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}")
            writer.write(reply)
            writer.close()

        async with await asyncio.start_server(serve, HOST, 0) as tcp:
            port = tcp.sockets[0].getsockname()[1]
            load = Load([0.0, 0.01, 99.0], [completion("p", 2)], ["ab"])
            calls = iter([False, False, True])
            moments = Load(load.moments[:2], load.bodies, load.texts)
            assert await open_load.send(HOST, port, "/", Load([0.0], load.bodies), lambda: True) == []
            return await open_load.send(HOST, port, "/", moments, lambda: next(calls))

    answers = asyncio.run(run())
    assert [answer.outcome for answer in answers] == [outcome] * 2
    assert (answers[0].first_token_ms is not None) == (outcome in (WHOLE, WRONG, CUT))


def test_only_streams_that_the_dead_server_had_begun_may_fail() -> None:
    def answer(outcome: str, first_s: float | None) -> Answer:
        return Answer(0.0, first_s, 9.0, outcome)

    found = {"killed_at_s": 5.0, "answers": [answer(WHOLE, 1.0), answer(CUT, 4.9), answer(CUT, 1.0)]}
    phases = {"1": failover_report.phase([answer(WHOLE, 1.0)])}
    report = {"phases": phases, "failover": failover_report.kill(dict(found))}
    assert report["failover"]["cut_while_in_flight"] == 2 and failover_report.failures(report) == {}
    for wrong in (answer(LOST, None), answer(REFUSED, None), answer(CUT, 8.0)):
        more = {**found, "answers": [*found["answers"], wrong]}
        assert failover_report.failures({**report, "failover": failover_report.kill(more)}) == {"failover": 1}


def test_arrivals_repeat_and_have_their_rate() -> None:
    moments = open_load.poisson(50.0, 100.0, seed=3)
    assert moments == open_load.poisson(50.0, 100.0, seed=3) == sorted(moments)
    assert 0.95 * 5000 < len(moments) < 1.05 * 5000 and moments[-1] < 100.0
