"""Requests whose reading or answer costs more than it may: they are refused, and nobody else notices."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dsserve.core.request import Limits, TokenEvent
from dsserve.protocol.served import ServedModel
from dsserve.sampling.grammar import GrammarCompiler
from dsserve.worker import live_batch
from tests.contract.rank0 import Worker, body, make_tokenizer, served_model
from tests.support.schemas import DEAD_ENDS, ENDLESS, TOO_COMPLEX, WIDTH, WRAPS, byte_tokenizer, chain, nested


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
    read: Any = live_batch.answer

    def slow(*arguments: Any) -> Any:
        clock[0] += 0.6 * live_batch.READING_S
        return read(*arguments)

    monkeypatch.setattr(live_batch, "answer", slow)
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


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(byte_tokenizer(), WIDTH, frozenset({256}))
    yield made
    made.close()


@pytest.fixture
def schema_worker(worker: Worker, compiler: GrammarCompiler) -> Worker:
    """With a tokenizer that can write JSON, a template that has tools, and a stream under way."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools }}<tool_call>{{ messages[0].content }}"
    worker.batch._served = ServedModel(
        "test", tokenizer, Limits(4096, 16, 32, max_running=8, max_waiting=2), 257, compiler
    )
    worker.call({"old": body(stream=True)})
    return worker


def completion(schema: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return {"body": {"prompt": "hello", "response_format": wanted}}


def chat(parameters: Any, choice: str) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    messages = [{"role": "user", "content": "hello"}]
    return {
        "body": {"messages": messages, "tools": [{"type": "function", "function": function}], "tool_choice": choice}
    }


def refused_beside_a_stream(worker: Worker, row: dict[str, Any], path: str) -> dict[str, Any]:
    started = time.monotonic()
    replies = worker.call({"old": {}, "a": row}, [TokenEvent("old", "y")], path=path)
    assert time.monotonic() - started < 10
    assert replies["old"][0] == b'data: {"text":"y"}\n\n'
    item, status, _, _ = replies["a"]
    return {**json.loads(item)["error"], "status": status}


HOSTILE = {
    "references": chain(1400, WRAPS["items"]),
    "references within bounds of number": chain(900, WRAPS["properties"]),
    "nesting": nested(400, WRAPS["items"]),
    "number": {"type": "integer", "minimum": 10**400},
    "length": {"type": "string", "maxLength": 10**30},
    "divisor": {"type": "integer", "multipleOf": 123456789},
    "surrogate": {"description": "\ud83d"},
    "range of multiples": TOO_COMPLEX["a range of multiples"],
    "products": TOO_COMPLEX["products of alternatives"],
    "dead end": DEAD_ENDS["declared only"],
}


def names(error: dict[str, Any], member: str) -> bool:
    """Whether an error is about a member; the bounds of any body name the place within it."""
    return error["param"] == member or error["param"].startswith((f"{member}.", f"{member}["))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_and_streams_go_on(schema_worker: Worker, name: str) -> None:
    error = refused_beside_a_stream(schema_worker, completion(HOSTILE[name]), "v1/completions")
    assert error["status"] == 400 and names(error, "response_format"), error
    error = refused_beside_a_stream(schema_worker, chat(HOSTILE[name], "required"), "v1/chat/completions")
    assert error["status"] == 400 and names(error, "tools[0].function.parameters"), error


@pytest.mark.parametrize("name", ["references", "nesting", "number", "surrogate"])
def test_a_hostile_schema_that_is_only_rendered_is_refused(schema_worker: Worker, name: str) -> None:
    error = refused_beside_a_stream(schema_worker, chat(HOSTILE[name], "auto"), "v1/chat/completions")
    assert error["status"] == 400 and names(error, "tools[0].function.parameters")


def test_the_worker_lives_while_the_process_that_compiles_is_killed(schema_worker: Worker) -> None:
    assert schema_worker.call({"old": {}, "first": completion({})}, path="v1/completions")["first"][1] == 200
    process = schema_worker.batch._served.grammars._process
    assert process is not None and process.pid is not None
    timer = threading.Timer(0.4, os.kill, [process.pid, signal.SIGKILL])
    timer.start()
    endless = completion(ENDLESS["patterns that all hold"])
    error = refused_beside_a_stream(schema_worker, endless, "v1/completions")
    timer.join()
    assert error["status"] == 429 and "too busy" in error["message"]
    replies = schema_worker.call({"old": {}, "b": completion({"const": 1})}, path="v1/completions")
    assert replies["b"][1] == 200 and schema_worker.engine.admitted[-1].sampling.grammar is not None
