"""What a request costs while it is read, and what it hears where there is no room: streams wait for neither."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dsserve.core.errors import RequestError
from dsserve.core.request import Limits
from dsserve.protocol.routes import answer
from dsserve.protocol.served import ServedModel
from dsserve.sampling.grammar import GrammarCompiler
from tests.contract.rank0 import Worker


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
        ("v1/tokenize", {"prompt": "7" * 98_000}),
        ("v1/tokenize", {"prompt": " " * 98_000}),
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
