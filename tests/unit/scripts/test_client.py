"""The asking and the measuring client, against small servers in this process."""

from __future__ import annotations

import json
import math
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from scripts.bench import report as bench_report
from scripts.bench.client import BenchError, Round, Stream, check_answer, join_chunks, run_round
from scripts.bench.prompts import OPENINGS, PROMPT_TOKENS, cut_prompts
from scripts.serve.ask import AskError, ask, curl_line

HOST = "127.0.0.1"


@contextmanager
def json_server(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = answer(body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/predictions/m"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_ask_sends_a_chat_message() -> None:
    with json_server(lambda body: (200, {"text": body["messages"][0]["content"].upper()})) as url:
        answer, body = ask(url, "hello", 5)
    assert answer == "HELLO"
    assert body == {"messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 5}


def test_ask_sends_a_prompt_to_a_model_without_chat_template() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "messages" in body:
            return 400, {"error": {"message": "no chat template", "type": "invalid_request_error", "param": "messages"}}
        return 200, {"text": body["prompt"] + "!"}

    with json_server(answer) as url:
        assert ask(url, "hello", 5) == ("hello!", {"prompt": "hello", "max_new_tokens": 5})


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (
            400,
            {"error": {"message": "max_new_tokens is above 3", "param": "max_new_tokens"}},
            "max_new_tokens is above 3",
        ),
        (503, {"code": 503, "type": "X", "message": "no worker"}, "503: no worker"),
        (200, b"plain text", "plain text"),
        (500, b"\xff", "status 500"),
    ],
)
def test_ask_says_why_there_is_no_answer(status: int, reply: Any, message: str) -> None:
    with json_server(lambda body: (status, reply)) as url, pytest.raises(AskError, match=message):
        ask(url, "hello", 5)


def test_ask_says_how_to_start_a_server() -> None:
    with socket.socket() as sock:
        sock.bind((HOST, 0))  # bound, not listening: refused
        with pytest.raises(AskError, match="make deploy"):
            ask(f"http://{HOST}:{sock.getsockname()[1]}/predictions/m", "hello", 5)


def test_the_curl_line_survives_the_shell() -> None:
    body = {"messages": [{"role": "user", "content": 'it\'s "é" $HOME `x`\n'}]}
    words = shlex.split(curl_line("http://h/p", body))
    assert words[:2] == ["curl", "http://h/p"]
    assert json.loads(words[words.index("-d") + 1]) == body


def event(body: Any) -> bytes:
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


LAST = b"\n"
LAST_PIECES = (b"0\r\n", b"\r", LAST)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def sse(tokens: int, finish: str = "length", delay_s: float = 0.0) -> Iterator[bytes]:
    yield HEAD
    for _ in range(tokens):
        time.sleep(delay_s)
        yield chunk(event({"text": "x"}))
    yield chunk(event({"text": "", "finish_reason": finish, "usage": {"completion_tokens": tokens}}) + event("[DONE]"))
    yield from LAST_PIECES


@contextmanager
def stream_server(pieces: Callable[[], Iterator[bytes]]) -> Iterator[int]:
    """Answers each connection in a thread of its own; after a whole answer it waits for the client to close."""

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            for piece in pieces():
                connection.sendall(piece)
            if piece == LAST:
                connection.recv(1)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(32)
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_round_is_measured_by_the_clock() -> None:
    with stream_server(lambda: sse(5, delay_s=0.05)) as port:
        result = run_round(HOST, port, "/predictions/m", ["a", "b", "c"], new_tokens=5)
    assert 1 < result.tokens_per_s <= 15 / 0.25
    assert len(result.first_token_ms) == 3
    assert all(50 <= value < 5000 for value in result.first_token_ms)
    # A busy machine may read a first piece late, and the last one is never early: five pieces take 250 ms at least.
    for first, token in zip(result.first_token_ms, result.token_ms, strict=True):
        assert 245 <= first + 4 * token < 5000


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"HTTP/1.1 503 Service Unavailable\r\n\r\n"], "refused: HTTP/1.1 503"),
        ([], "no answer"),
        ([HEAD, chunk(event({"text": "x"}))], "broke off"),
        (list(sse(3, finish="stop")), "ended early"),
        (list(sse(2)), "ended early"),
    ],
)
def test_an_answer_that_cannot_be_counted_is_an_error(pieces: list[bytes], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        check_answer(Stream(0.0, [(1.0, piece) for piece in pieces]), new_tokens=3)


def test_a_full_answer_is_accepted() -> None:
    check_answer(Stream(0.0, [(1.0, b"".join(sse(3)))]), new_tokens=3)


def test_chunks_are_joined_across_event_borders() -> None:
    assert join_chunks(chunk(b"data: a\n") + chunk(b"\r\n\r\n") + b"0\r\n\r\n") == b"data: a\n\r\n\r\n"


def test_percentiles() -> None:
    assert bench_report.percentile([3, 1, 2], 50) == 2
    assert bench_report.percentile(range(1, 101), 95) == 95
    assert math.isnan(bench_report.percentile([], 50))


def make_report(rates: dict[str, float], first_ms: float) -> dict[str, Any]:
    rounds = {name: [Round(rate, [first_ms], [10.0], [40.0])] * 3 for name, rate in rates.items()}
    http = bench_report.http_numbers(rounds)
    generate = bench_report.generate_numbers({1: [10.0], 8: [100.0]}, {1: [10.0], 8: [100.0]})
    machine = {"cpu": "c", "cores": 2, "versions": {"torch": "1"}}
    setting = {"model": "m", "ranks": 2, "device": "cpu", "dtype": "bf16", "repeats": 3}
    setting |= {"prompt_tokens": PROMPT_TOKENS, "new_tokens": 64}
    report = {"machine": machine, "setting": setting, "http": http, "generate": generate}
    return report | {"aims": bench_report.compare(http, generate)}


def test_aims_compare_http_with_generate() -> None:
    report = make_report({"1": 11.5, "4": 50.0, "8": 115.0, "16": 170.0, "16 sampled": 160.0}, first_ms=61.0)
    assert [item["value"] for item in report["aims"]] == [1.15, 1.15, 1.7, 0.94, 61.0]
    assert [item["met"] for item in report["aims"]] == [True, False, True, True, False]
    table = bench_report.table(report)
    assert table.count("MISSED") == 2
    assert "16 concurrent" in table
    assert max(map(len, table.splitlines())) <= 120
    json.loads(json.dumps(report))


class WordTokenizer:
    def __call__(self, text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def decode(self, ids: list[str], skip_special_tokens: bool) -> str:
        return " ".join(ids)


def test_prompts_are_cut_to_one_length() -> None:
    prompts = cut_prompts(WordTokenizer())
    assert len(set(prompts)) == len(OPENINGS) == 16
    assert {len(prompt.split()) for prompt in prompts} == {PROMPT_TOKENS}


def test_prompts_that_cannot_be_cut_are_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be cut to 40 tokens"):
        cut_prompts(WordTokenizer(), 40)
