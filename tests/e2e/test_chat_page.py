"""The chat page in a real browser: before a server that says what the test wants, then before HAProxy and the model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.reliability import balancer
from scripts.reliability.balancer import BalancerError
from tests.conftest import ROOT
from tests.e2e.conftest import Served, free_ports
from tests.support.browser import ENTER, Browser, browser

HOST = "127.0.0.1"
PAGE = ROOT / "configs" / "chat" / "chat.html"
HTML = '<img src=x onerror="document.title=\'run\'"><script>document.title="run"</script><b>bold</b> & "so"\n  on'


@dataclass
class Scripted:
    """What the server does: pieces of its stream as they go over the wire, or a status with an error."""

    port: int
    pieces: list[bytes] = field(default_factory=list)
    status: int = 200
    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)

    def says(self, text: str, reason: str = "stop") -> None:
        """A whole answer, a byte a piece: no character and no event comes at once."""
        chunk = {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
        last = {"choices": [{"delta": {}, "finish_reason": reason}]}
        usage = {"choices": [], "usage": {"completion_tokens": 7}}
        events = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in (chunk, last, usage)]
        whole = "".join([*events, "data: [DONE]\n\n"]).encode()
        self.pieces, self.status = [whole[at : at + 1] for at in range(len(whole))], 200
        self.gate.set()


@contextmanager
def scripted() -> Iterator[Scripted]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self.reply(200, "text/html; charset=utf-8", PAGE.read_bytes())
            else:
                self.reply(200, "application/json", b'{"data": [{"id": "a-model"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((body, self.headers["Authorization"]))
            if state.status != 200:
                error = json.dumps({"error": {"message": HTML}}).encode()
                self.reply(state.status, "application/json", error, {"Retry-After": "3"})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for piece in state.pieces:
                if not piece:
                    state.gate.wait(30)
                self.wfile.write(piece)
                self.wfile.flush()

        def reply(self, status: int, kind: str, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as httpd:
        httpd.daemon_threads = True
        state = Scripted(httpd.server_port)
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield state
        finally:
            state.gate.set()
            httpd.shutdown()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def server(window: Browser) -> Iterator[Scripted]:
    with scripted() as found:
        window.open(f"http://{HOST}:{found.port}/")
        window.wait_for(lambda: window.texts("#model") == ["a-model"])
        yield found


def say(window: Browser, text: str) -> None:
    """Shift+Enter for the lines of a message, Enter at the end."""
    window.run("document.getElementById('text').value = arguments[0]", text)
    window.write("#text", ENTER)


def is_idle(window: Browser) -> bool:
    return bool(window.run("return document.getElementById('stop').hidden"))


def test_text_of_people_and_of_the_model_stays_text(window: Browser, server: Scripted) -> None:
    server.says(HTML + " 日本 👋")
    say(window, HTML)
    window.wait_for(lambda: window.texts(".note"))
    assert window.texts(".user") == [HTML] and window.texts(".assistant") == [HTML + " 日本 👋"]
    assert window.run("return document.querySelectorAll('#chat *:not(.message)').length") == 0
    assert window.run("return document.title") == "a-model"
    assert "7 tokens" in window.texts(".note")[0]


def test_a_conversation_grows_and_a_new_one_begins(window: Browser, server: Scripted) -> None:
    server.says("One.")
    say(window, "first")
    window.wait_for(lambda: len(window.texts(".note")) == 1)
    window.run("document.querySelector('details').open = true")
    for field_name, value in (("#system", "Be brief."), ("#key", "secret"), ("#tokens", "9")):
        window.write(field_name, value)
    server.says("Two.", reason="length")
    say(window, "second")
    window.wait_for(lambda: len(window.texts(".note")) == 2)
    (_, no_key), (body, key) = server.asked
    assert no_key is None and key == "Bearer secret"
    roles = [(message["role"], message["content"]) for message in body["messages"]]
    asked = [("system", "Be brief."), ("user", "first"), ("assistant", "One."), ("user", "second")]
    assert roles == asked and body["max_completion_tokens"] == 9 and body["stream"] is True
    assert window.texts(".note")[1].endswith("cut at the limit")
    window.click("#new")
    assert window.texts(".message") == []
    say(window, "third")
    window.wait_for(lambda: window.texts(".note"))
    assert [message["content"] for message in server.asked[-1][0]["messages"]] == ["Be brief.", "third"]


def test_an_answer_shows_while_it_comes_and_can_be_stopped(window: Browser, server: Scripted) -> None:
    event = b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'
    server.pieces = [event, event, b"", event]
    say(window, "go on")
    window.wait_for(lambda: window.texts(".assistant") == ["word word "])
    assert not is_idle(window)
    say(window, "not now")
    assert window.texts(".user") == ["go on"], "one at a time"
    window.click("#stop")
    window.wait_for(lambda: is_idle(window))
    assert window.texts(".note") == ["stopped"] and window.texts(".assistant") == ["word word "]


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        ([], 429, f"429: {HTML} (again in 3 s)"),
        ([b'data: {"error": {"message": "the server failed"}}\n\n'], 200, "the server failed"),
        ([b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'], 200, "the answer broke off"),
    ],
)
def test_what_goes_wrong_is_said(
    window: Browser, server: Scripted, pieces: list[bytes], status: int, message: str
) -> None:
    server.pieces, server.status = pieces, status
    say(window, "hello")
    assert window.wait_for(lambda: window.texts(".error")) == [message]
    assert is_idle(window)
    server.says("Well.")
    say(window, "again")
    window.wait_for(lambda: window.texts(".note"))
    assert window.texts(".assistant")[-1] == "Well."


def test_the_model_answers_through_haproxy(window: Browser, small: Served, tmp_path: Path) -> None:
    try:
        balancer.find_haproxy()
    except BalancerError as error:
        pytest.skip(str(error))
    port = free_ports().inference
    settings = {"CHAT": str(PAGE), "API_KEY": "k"}
    with balancer.running(tmp_path, port, small.record.name, [f"{HOST}:{small.record.port}"], **settings) as front:
        front.wait_until("s1", True, 30)
        assert httpx.get(f"{front.url}/v1/models").status_code == 401
        window.open(f"{front.url}/")
        window.run("document.querySelector('details').open = true")
        for name, value in (("#key", "k"), ("#tokens", "24")):
            window.write(name, value)
        window.run("document.getElementById('temperature').value = 0")
        say(window, "What is the capital of Japan?")
        seen: set[str] = set()
        window.wait_for(lambda: seen.update(window.texts(".assistant")) or window.texts(".note, .error"))
        assert window.texts(".error") == [], front.url
        whole = window.texts(".assistant")[0]
        assert "Tokyo" in whole
        # Its first token at least: the others leave every 150 ms, which may be the rest of a short answer.
        pieces = {text for text in seen if text and text != whole}
        assert pieces and all(whole.startswith(piece) for piece in pieces)
