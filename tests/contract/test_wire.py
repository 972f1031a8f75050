"""Bodies as TorchServe's worker reads them off its socket: what its own parser cannot take is a 400 of ours."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from ts.protocol.otf_message_handler import _retrieve_input_data

from dsserve.core.errors import RequestError
from dsserve.protocol.routes import answer
from tests.contract.rank0 import Worker

TYPES = ["application/json", "application/json; charset=utf-8", "application/vnd.api+json", "text/plain"]
RAW = {
    "100,000 deep": b"[" * 100_000,
    "deep and closed": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "as deep as the parser goes": b'{"tools": ' + b"[" * 900 + b"]" * 900 + b"}",
    "10,000 digits": b'{"prompt": "hello", "top_k": ' + b"9" * 10_000 + b"}",
    "4,000 digits": b'{"prompt": "hello", "seed": ' + b"9" * 4000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "NaN": b'{"prompt": "hello", "temperature": NaN}',
    "Infinity": b'{"prompt": "hello", "top_p": -Infinity}',
    "1e400": b'{"prompt": "hello", "logit_bias": {"1": 1e400}}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a lone surrogate as a name": b'{"\\ud800": 1}',
    "nothing": b"",
    "zeros": b"\x00" * 1000,
}


class Socket:
    """The worker's end, with these bytes on it."""

    def __init__(self, sent: bytes) -> None:
        self._sent = sent

    def recv(self, length: int) -> bytes:
        found, self._sent = self._sent[:length], self._sent[length:]
        return found


def received(body: bytes, content_type: str) -> dict[str, Any]:
    """A row as TorchServe makes it."""
    parts = [b"body", content_type.encode(), body]
    found = _retrieve_input_data(Socket(b"".join(struct.pack("!i", len(part)) + part for part in parts)))
    return {found["name"]: found["value"]}


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("name", RAW)
def test_what_no_parser_takes_is_a_400(name: str, content_type: str, worker: Worker) -> None:
    kind = content_type.partition(";")[0]
    if kind == "text/plain" and name != "not UTF-8":
        pytest.skip("any text is a prompt")
    for path in ("", "v1/completions", "v1/chat/completions", "v1/tokenize", "v1/detokenize"):
        with pytest.raises(RequestError) as caught:
            answer(path, "r", received(RAW[name], content_type), kind, worker.served)
        assert caught.value.status == 400
        caught.value.body()["error"]["message"].encode()  # type: ignore[union-attr]


def test_what_it_parses_arrives_as_it_was_sent(worker: Worker) -> None:
    for content_type in TYPES[:3]:
        row = received(b'{"prompt": "hello", "top_k": 1' + b"0" * 400 + b"}", content_type)
        job = answer("", "r", row, content_type.partition(";")[0], worker.served)
        assert job.requests[0].sampling.top_k is None  # type: ignore[union-attr]
