"""Replies of `v1/completions` and `v1/chat/completions`: whole objects and streams of chunks.

`whole` and `stream` differ in when something is sent; the shapes (`shapes`) in what an object holds.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.core.request import TokenEvent
from dsserve.protocol.openai.schema import StreamOptions
from dsserve.protocol.openai.shapes import Shape
from dsserve.protocol.reply import SSE_TYPE, Reply, json_object, sse, sse_failure, to_json
from dsserve.protocol.served import ServedModel


@dataclass(frozen=True)
class Envelope:
    """What every object of one reply repeats."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, served: ServedModel, prefix: str) -> Envelope:
        return cls(f"{prefix}-{uuid.uuid4().hex}", served.name, served.fingerprint)

    def body(self, kind: str, choices: list[bytes], **more: Any) -> bytes:
        """One object of the reply, as JSON; so are the choices."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        members = {name: to_json(value) for name, value in {**head, "system_fingerprint": self.fingerprint}.items()}
        members["choices"] = b"[" + b",".join(choices) + b"]"
        return json_object({**members, **{name: to_json(value) for name, value in more.items()}})


class WholeReply(Reply):
    """One object when all texts have ended."""

    def __init__(self, envelope: Envelope, shapes: list[Shape], texts_a_prompt: int) -> None:
        super().__init__(len(shapes), texts_a_prompt)
        self._envelope = envelope
        self._shapes = shapes

    def _render(self, event: TokenEvent) -> bytes:
        self._shapes[event.index].add(event)
        if not self.is_done:
            return b""
        choices = [shape.choice(index) for index, shape in enumerate(self._shapes)]
        return self._envelope.body(self._shapes[0].whole, choices, usage=self.usage.body())


class StreamReply(Reply):
    """Chunks as text comes; at the end the usage, where asked for, and `[DONE]`."""

    content_type = SSE_TYPE

    def __init__(
        self, envelope: Envelope, shapes: list[Shape], texts_a_prompt: int, options: StreamOptions | None
    ) -> None:
        super().__init__(len(shapes), texts_a_prompt)
        self._envelope = envelope
        self._shapes = shapes
        self._options = options or StreamOptions()
        self._so_far: dict[int, TokenEvent] = {}

    def _render(self, event: TokenEvent) -> bytes:
        self._so_far[event.index] = event
        frame = bytearray()
        for choice in self._shapes[event.index].deltas(event):
            frame += self._chunk([to_json(choice)], self._running_usage())
        if self.is_done:
            if self._options.include_usage:
                frame += self._chunk([], {"usage": self.usage.body()})
            frame += sse(b"[DONE]")
        return bytes(frame)

    def _chunk(self, choices: list[bytes], more: dict[str, Any]) -> bytes:
        return sse(self._envelope.body(self._shapes[0].chunk, choices, **more))

    def _running_usage(self) -> dict[str, Any]:
        """The `usage` member of an ordinary chunk: none, null, or the counts so far."""
        if self._options.continuous_usage_stats:
            events = self._so_far.items()
            prompt = sum(event.prompt_tokens for index, event in events if index % self._texts_a_prompt == 0)
            completion = sum(event.completion_tokens for event in self._so_far.values())
            return {
                "usage": {
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "total_tokens": prompt + completion,
                }
            }
        return {"usage": None} if self._options.include_usage else {}

    def fail(self, error: RequestError) -> bytes:
        return sse_failure(error)
