"""Requests whose reading or answer costs more than it may: they are refused, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dsserve.errors import RequestError
from dsserve.generation.grammar import GrammarCompiler
from dsserve.generation.request import Limits, TokenEvent
from dsserve.protocol import batch
from dsserve.protocol.routes import answer
from dsserve.protocol.served import ServedModel
from tests.contract.rank0 import Worker, body, make_tokenizer, served_model


@pytest.mark.parametrize(
    ("path", "request_body", "words"),
    [
        ("v1/completions", {"prompt": ["hello"] * 200_000, "n": 128}, "25600000 texts"),
        ("v1/completions", {"prompt": "hello", "n": 5}, "5 texts"),
        ("v1/completions", {"prompt": "hello", "n": 65}, "at most 64"),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "n": 65}, "at most 64"),
    ],
)
def test_more_texts_than_there_may_be_are_refused_before_they_are_made(
    worker: Worker, path: str, request_body: dict[str, Any], words: str
) -> None:
    worker.batch._served = served_model(make_tokenizer(), Limits(64, 16, 32, max_running=2, max_waiting=2, max_n=64))
    if request_body["n"] == 128:
        worker.batch._served = worker.served
    started = time.monotonic()
    item, status, _, _ = worker.call({"a": {"body": request_body}}, path=path)["a"]
    assert time.monotonic() - started < 2
    error = json.loads(item)["error"]
    assert status == 400 and error["param"] == "n" and words in error["message"]
    assert worker.engine.admitted == []


def test_reading_that_takes_too_long_sends_the_rest_away_and_streams_go_on(
    worker: Worker, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.call({"old": body(stream=True)}, [TokenEvent("old", "x")])
    read: Any = batch.answer

    def slow(*arguments: Any) -> Any:
        clock[0] += 0.6 * batch.READING_S
        return read(*arguments)

    monkeypatch.setattr(batch, "answer", slow)
    rows = {"old": {}, "a": body(max_new_tokens=0), "b": body(max_new_tokens=0), "c": body(), "d": body()}
    replies = worker.call(rows, [TokenEvent("old", "y")])
    assert [replies[name][1] for name in rows] == [200, 400, 400, 429, 429]
    assert replies["old"][0] == b'data: {"text":"y"}\n\n'
    assert json.loads(replies["c"][0])["error"]["type"] == "rate_limit_error"
    assert worker.ctx.get_response_headers(3)["Retry-After"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_cannot_be_rendered_fails_alone(
    worker: Worker, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.call({"a": body(stream=stream), "b": body(stream=True)})

    def fail(event: TokenEvent) -> bytes:
        raise RecursionError

    monkeypatch.setattr(worker.batch._rows["a"].reply, "take", fail)
    replies = worker.call({"a": {}, "b": {}}, [TokenEvent("a", "x"), TokenEvent("b", "y")])
    assert b'"internal_error"' in replies["a"][0] and replies["a"][3] == "false"
    assert replies["b"][0] == b'data: {"text":"y"}\n\n' and worker.engine.evicted == ["a"]


@pytest.mark.parametrize(("running", "waiting", "free"), [(1, 0, 3), (2, 1, 1), (2, 2, 0)])
def test_a_request_that_finds_no_room_hears_how_much_there_is(
    worker: Worker, running: int, waiting: int, free: int
) -> None:
    worker.engine.running, worker.engine.waiting = running, waiting
    request_body = {"prompt": "hello", "n": 4}
    item, status, _, _ = worker.call({"a": {"body": request_body}}, path="v1/completions")["a"]
    message = json.loads(item)["error"]["message"]
    assert status == 429 and "asks for 4 text(s)" in message
    assert f"{free} of 4 places are free ({running} run, {waiting} wait)" in message
    assert ("fewer texts" in message) is (free > 0)


@pytest.fixture(scope="module")
def real(smollm2: Path) -> ServedModel:
    """SmolLM2's tokenizer and context, with a template that knows tools."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}{{ tools }}"
    limits = Limits(8192, 256, 8191)
    served = ServedModel("m", tokenizer, limits, len(tokenizer), GrammarCompiler(tokenizer, 49_152, frozenset({2})))
    assert served.token_sizes.text > 80  # made at load
    return served


def turns(count: int, calls: int = 0, parts: int = 0) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    content: Any = [{"type": "text", "text": ""}] * parts if parts else "a"
    turn = {"role": "assistant", "content": content, "tool_calls": [call] * calls}
    return {"messages": [turn] * count}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/tokenize", {"prompt": "7" * 1_000_000}),  # 1.9 s where it was tokenized whole
        ("v1/tokenize", {"prompt": "7" * 131_000}),
        ("v1/tokenize", {"prompt": " " * 131_000}),
        ("v1/tokenize", {"prompt": "e\u0301" * 60_000}),
        ("v1/tokenize", turns(26_000)),
        ("v1/completions", {"prompt": ["7" * 8000] * 79}),
        ("v1/completions", {"prompt": [1] * 250_000}),
        ("v1/chat/completions", turns(26_000)),
        ("v1/chat/completions", turns(90, calls=128)),
        ("v1/chat/completions", turns(140, parts=256)),
        ("v1/chat/completions", turns(2048)),
        ("v1/detokenize", {"tokens": [46_778] * 100_000}),
    ],
)
def test_no_body_of_a_megabyte_takes_long_to_read(path: str, body: dict[str, Any], real: ServedModel) -> None:
    """Every stream waits meanwhile. In seconds of the processor, and several times what a quiet one needs."""
    started = time.process_time()
    with contextlib.suppress(RequestError):
        answer(path, "r", {"body": body}, "application/json", real)
    assert time.process_time() - started < 1.5
