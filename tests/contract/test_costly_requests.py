"""Requests whose reading or answer costs more than it may: they are refused, and nobody else notices."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dsserve.generation.request import Limits, TokenEvent
from dsserve.protocol import batch
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
