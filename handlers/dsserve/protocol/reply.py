"""How one request is answered: plain text, one JSON object, or server-sent events. Bytes only, no TorchServe types."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

from dsserve.errors import RequestError
from dsserve.generation.request import FinishReason, Usage
from dsserve.protocol.schema import GenerateBody

JSON_TYPE = "application/json"


class Reply(ABC):
    """One request's reply while its text grows."""

    content_type: str

    @abstractmethod
    def delta(self, text: str) -> bytes:
        """What is sent now for some new text; empty where the reply goes out at the end."""

    @abstractmethod
    def finish(self, text: str, finish_reason: FinishReason, usage: Usage) -> bytes:
        """What is sent at the end; `text` is the last piece."""

    def fail(self, error: RequestError) -> bytes:
        """What is sent when the request breaks after its status went out: the error object in place of the reply."""
        return error_body(error)


class PlainReply(Reply):
    """The generated text and nothing else, at the end."""

    content_type = "text/plain; charset=utf-8"

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def delta(self, text: str) -> bytes:
        self._pieces.append(text)
        return b""

    def finish(self, text: str, finish_reason: FinishReason, usage: Usage) -> bytes:
        return "".join([*self._pieces, text]).encode()


class JsonReply(PlainReply):
    """One JSON object at the end."""

    content_type = JSON_TYPE

    def finish(self, text: str, finish_reason: FinishReason, usage: Usage) -> bytes:
        whole = super().finish(text, finish_reason, usage).decode()
        return _json({"text": whole, "finish_reason": finish_reason, "usage": usage.body()})


class SseReply(Reply):
    """Server-sent events: one JSON object an event, then `[DONE]`."""

    content_type = "text/event-stream; charset=utf-8"

    def delta(self, text: str) -> bytes:
        return _event(_json({"text": text})) if text else b""

    def finish(self, text: str, finish_reason: FinishReason, usage: Usage) -> bytes:
        last = _json({"text": "", "finish_reason": finish_reason, "usage": usage.body()})
        return self.delta(text) + _event(last) + _event(b"[DONE]")

    def fail(self, error: RequestError) -> bytes:
        return _event(error_body(error)) + _event(b"[DONE]")


def make_reply(body: GenerateBody | str) -> Reply:
    """The kind of reply that a request asks for."""
    if isinstance(body, str):
        return PlainReply()
    return SseReply() if body.stream else JsonReply()


def error_body(error: RequestError) -> bytes:
    """The JSON body of a refused request."""
    return _json(error.body())


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
