"""How one request is answered: plain text, one JSON object, or server-sent events. Bytes only, no TorchServe types.

The plain endpoint's replies and what all replies share; OpenAI's are `protocol.openai.reply`'s.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.core.request import TokenEvent, Usage

JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"


class Reply(ABC):
    """One request's reply while its texts grow.

    Args:
        sequences: number of texts.
        texts_a_prompt: so many sequences in a row have the same prompt, which counts once.

    Attributes:
        usage: tokens of the sequences that have ended.
    """

    content_type = JSON_TYPE

    def __init__(self, sequences: int = 1, texts_a_prompt: int = 1) -> None:
        self.usage = Usage()
        self._open = sequences
        self._texts_a_prompt = texts_a_prompt

    @property
    def is_stream(self) -> bool:
        """Whether the client reads its text as it grows."""
        return self.content_type == SSE_TYPE

    @property
    def is_done(self) -> bool:
        """Whether every text has ended."""
        return self._open == 0

    def take(self, event: TokenEvent) -> bytes:
        """What is sent now for an event; empty where the reply goes out at the end."""
        if event.is_last:
            self._open -= 1
            self.usage.completion_tokens += event.completion_tokens
            if event.index % self._texts_a_prompt == 0:
                self.usage.prompt_tokens += event.prompt_tokens
                self.usage.cached_tokens += event.cached_tokens
        return self._render(event)

    @abstractmethod
    def _render(self, event: TokenEvent) -> bytes:
        """The bytes for an event that has been counted."""

    def fail(self, error: RequestError) -> bytes:
        """What is sent when the request breaks after its status went out: the error object in place of the reply."""
        return error_body(error)


class PlainReply(Reply):
    """The generated text and nothing else, at the end."""

    content_type = "text/plain; charset=utf-8"

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[str] = []

    def _render(self, event: TokenEvent) -> bytes:
        self._pieces.append(event.text)
        return self._whole(event) if event.is_last else b""

    def _whole(self, last: TokenEvent) -> bytes:
        return "".join(self._pieces).encode()


class JsonReply(PlainReply):
    """One JSON object at the end."""

    content_type = JSON_TYPE

    def _whole(self, last: TokenEvent) -> bytes:
        text = "".join(self._pieces)
        return to_json({"text": text, "finish_reason": last.finish_reason, "usage": self.usage.body()})


class SseReply(Reply):
    """Server-sent events: one JSON object an event, then `[DONE]`."""

    content_type = SSE_TYPE

    def _render(self, event: TokenEvent) -> bytes:
        delta = sse(to_json({"text": event.text})) if event.text else b""
        if not event.is_last:
            return delta
        last = to_json({"text": "", "finish_reason": event.finish_reason, "usage": self.usage.body()})
        return delta + sse(last) + sse(b"[DONE]")

    def fail(self, error: RequestError) -> bytes:
        return sse_failure(error)


def error_body(error: RequestError) -> bytes:
    """The JSON body of a refused request."""
    return to_json(error.body())


def sse_failure(error: RequestError) -> bytes:
    """The last events of a stream that broke."""
    return sse(error_body(error)) + sse(b"[DONE]")


def sse(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON, UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class JsonArray:
    """An array that grows as JSON text: to render a reply of megabytes at its end would hold every stream."""

    def __init__(self) -> None:
        self._text = bytearray()

    def extend(self, items: Iterable[Any]) -> None:
        """Adds items at the end."""
        added = to_json(list(items))[1:-1]
        if added:
            self._text += b"," + added if self._text else added

    def json(self) -> bytes:
        """The array."""
        return b"[" + self._text + b"]"


def json_object(members: Mapping[str, bytes]) -> bytes:
    """An object of values that are JSON already."""
    return b"{" + b",".join(to_json(name) + b":" + value for name, value in members.items()) + b"}"
