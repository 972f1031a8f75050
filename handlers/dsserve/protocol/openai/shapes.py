"""One text of an OpenAI reply: what its `choices` entry and its stream's deltas look like.

Completions hold text, chat holds a message with content or tool calls. Knows no ids and no server-sent events
(`reply`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dsserve.core.request import TokenEvent, TokenLogprob
from dsserve.protocol.openai.token_text import TokenText
from dsserve.protocol.openai.tools import Call, ToolCallText
from dsserve.protocol.reply import JsonArray, json_object, to_json


class Shape(ABC):
    """One text while it grows. `add` and `choice` serve whole replies, `deltas` streams."""

    whole: str
    chunk: str

    @abstractmethod
    def add(self, event: TokenEvent) -> None:
        """Takes an event in."""

    @abstractmethod
    def choice(self, index: int) -> bytes:
        """The finished entry of `choices`, in JSON."""

    @abstractmethod
    def deltas(self, event: TokenEvent) -> list[dict[str, Any]]:
        """The entries of `choices` that a stream sends for an event, one a chunk."""


class CompletionShape(Shape):
    """`v1/completions`.

    Args:
        token_text: where log probabilities are wanted, else None.
        prompt: what `echo` puts before the text.
    """

    whole = chunk = "text_completion"

    def __init__(self, token_text: TokenText | None = None, prompt: str = "") -> None:
        self._token_text = token_text
        self._text = prompt
        self._logprobs = {name: JsonArray() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        self._offset = 0
        self._reason: str | None = None

    def add(self, event: TokenEvent) -> None:
        self._text += event.text
        for name, values in (self._report([*event.prompt_logprobs, *event.logprobs]) or {}).items():
            self._logprobs[name].extend(values)
        self._reason = event.finish_reason

    def choice(self, index: int) -> bytes:
        report = {name: array.json() for name, array in self._logprobs.items()}
        return json_object(
            {
                "index": to_json(index),
                "text": to_json(self._text),
                "logprobs": to_json(None) if self._token_text is None else json_object(report),
                "finish_reason": to_json(self._reason),
            }
        )

    def deltas(self, event: TokenEvent) -> list[dict[str, Any]]:
        if not (event.text or event.logprobs or event.finish_reason):
            return []
        logprobs = self._report(list(event.logprobs)) if event.logprobs else None
        choice = {"index": event.index, "text": event.text, "logprobs": logprobs}
        return [{**choice, "finish_reason": event.finish_reason}]

    def _report(self, logprobs: list[TokenLogprob]) -> dict[str, list[Any]] | None:
        if self._token_text is None:
            return None
        texts = [self._token_text.text_of(entry.token) for entry in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float | None] | None:
        """The likeliest tokens, and the token itself where it is none of them, as OpenAI has it."""
        assert self._token_text is not None
        if entry.logprob is None:
            return None
        top = {self._token_text.text_of(token): _finite(value) for token, value in entry.top}
        return top | {self._token_text.text_of(entry.token): _finite(entry.logprob)}


class ChatShape(Shape):
    """`v1/chat/completions`.

    Args:
        token_text: where log probabilities are wanted, else None.
        calls: where the model may call tools, else None.
        most_calls: None = any number.
    """

    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, token_text: TokenText | None = None, calls: ToolCallText | None = None, most_calls: int | None = None
    ) -> None:
        self._token_text = token_text
        self._parser = calls
        self._most_calls = most_calls
        self._calls: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        self._logprobs = JsonArray()
        self._reason: str | None = None
        self._is_begun = False

    def add(self, event: TokenEvent) -> None:
        if self._token_text is not None:
            self._logprobs.extend(map(self._entry, event.logprobs))
        for piece in self._split(event):
            if isinstance(piece, str):
                self._pieces.append(piece)
        self._reason = self._finish_reason(event)

    def choice(self, index: int) -> bytes:
        content: str | None = "".join(self._pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content if content and content.strip() else None, "tool_calls": self._calls}
        report = {"content": self._logprobs.json(), "refusal": to_json(None)}
        return json_object(
            {
                "index": to_json(index),
                "message": to_json(message),
                "logprobs": to_json(None) if self._token_text is None else json_object(report),
                "finish_reason": to_json(self._reason),
            }
        )

    def deltas(self, event: TokenEvent) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if not self._is_begun:
            self._is_begun = True
            deltas.append({"role": "assistant", "content": ""})
        for piece in self._split(event):
            deltas.append({"content": piece} if isinstance(piece, str) else {"tool_calls": [piece]})
        logprobs = self._report(list(event.logprobs)) if event.logprobs else None
        if logprobs is not None and not any(delta.get("content") for delta in deltas):
            deltas.append({"content": ""})
        if event.finish_reason:
            deltas.append({})
        choices: list[dict[str, Any]] = [
            {"index": event.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if logprobs is not None:
            next(c for c in reversed(choices) if "content" in c["delta"])["logprobs"] = logprobs
        if event.finish_reason:
            choices[-1]["finish_reason"] = self._finish_reason(event)
        return choices

    def _split(self, event: TokenEvent) -> list[str | dict[str, Any]]:
        """New content and new calls, in order."""
        if self._parser is None:
            return [event.text] if event.text else []
        pieces = self._parser.push(event.text) + (self._parser.flush() if event.is_last else [])
        found: list[str | dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, Call):
                if self._most_calls is None or len(self._calls) < self._most_calls:
                    self._calls.append(piece.body())
                    found.append({"index": len(self._calls) - 1, **self._calls[-1]})
            else:
                found.append(piece)
        return found

    def _finish_reason(self, event: TokenEvent) -> str | None:
        return "tool_calls" if self._calls and event.finish_reason == "stop" else event.finish_reason

    def _report(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if self._token_text is None:
            return None
        return {"content": [self._entry(entry) for entry in logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        return {**self._token(entry.token, entry.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        assert self._token_text is not None
        value = self._token_text.bytes_of(token)
        return {"token": value.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(value)}


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot come."""
    return logprob if logprob is None or logprob > -9999.0 else -9999.0
