"""Tool calls in the text of models that write them as Hermes and Qwen do: `<tool_call>{"name", ...}</tool_call>`.

Finds out from the chat template whether a model knows tools and in which form; other forms are refused by name.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.engine.detokenizer import overlap
from dsserve.protocol.json_bounds import check_json

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def check_tool_format(template: str | None) -> None:
    """Raises RequestError (400) where the model's template has no tools, or a form that is not known here."""
    if not template or "tools" not in template:
        raise RequestError("this model's chat template has no tools: leave out tools", param="tools")
    if OPENING not in template:
        raise RequestError(
            f"this model writes tool calls in a form that is not supported ({OPENING}...{CLOSING} is, as Hermes "
            "and Qwen write them): leave out tools, or set tool_choice: none",
            param="tools",
        )


@dataclass(frozen=True)
class Call:
    """One parsed call; `arguments` is JSON text, as OpenAI has it."""

    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """The object of a reply's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class ToolCallText:
    """Splits a growing text into what is content and what are calls. A block that is no valid call stays content."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str | Call]:
        """What is certain after some new text, in order."""
        self._held += text
        found: list[str | Call] = []
        while True:
            start = self._held.find(OPENING)
            if start < 0:
                keep = overlap(self._held, OPENING)
                found.append(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                return [piece for piece in found if piece]
            end = self._held.find(CLOSING, start)
            if end < 0:
                found.append(self._held[:start])
                self._held = self._held[start:]
                return [piece for piece in found if piece]
            found += [self._held[:start], _read(self._held[start : end + len(CLOSING)])]
            self._held = self._held[end + len(CLOSING) :]

    def flush(self) -> list[str | Call]:
        """The rest at the end of the text; an open block is read as if it were closed."""
        held, self._held = self._held, ""
        return [_read(held)] if held else []


def _read(block: str) -> str | Call:
    inside = block.removeprefix(OPENING).removesuffix(CLOSING)
    try:
        call = json.loads(inside)
        check_json(call, "arguments")  # a model can be made to write what cannot be sent
    except (ValueError, RecursionError, RequestError):
        return block
    if not block.startswith(OPENING) or not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return block
    return Call(call["name"], json.dumps(call.get("arguments", {}), ensure_ascii=False))
