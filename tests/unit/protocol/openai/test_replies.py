"""OpenAI's objects from events: whole and streamed replies carry the same, whatever the order of sequences."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from dsserve.core.errors import RequestError
from dsserve.core.request import TokenEvent, TokenLogprob
from dsserve.protocol.openai.reply import Envelope, StreamReply, WholeReply
from dsserve.protocol.openai.schema import StreamOptions
from dsserve.protocol.openai.shapes import ChatShape, CompletionShape
from dsserve.protocol.openai.tools import ToolCallText

ENVELOPE = Envelope("id-1", "model", "fp_1", 17)


class Words:
    """Token n is the letter n."""

    def bytes_of(self, token: int) -> bytes:
        return chr(token).encode()

    def text_of(self, token: int) -> str:
        return chr(token)


def events(index: int, text: str, reason: Any = "stop", logprobs: bool = False) -> list[TokenEvent]:
    made = []
    for at, letter in enumerate(text):
        last = at == len(text) - 1
        entry = (TokenLogprob(ord(letter), -0.5, ((ord(letter), -0.5), (ord("z"), -2.0))),) if logprobs else ()
        made.append(TokenEvent("r", letter, index, reason if last else None, at + 1, 4, 2, entry))
    return made


def interleaved(*parts: list[TokenEvent]) -> list[TokenEvent]:
    return [event for step in zip(*parts, strict=True) for event in step]


def parse_stream(frames: bytes) -> list[dict[str, Any]]:
    blocks = frames.decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_a_whole_completion_counts_each_prompt_once() -> None:
    reply = WholeReply(ENVELOPE, [CompletionShape() for _ in range(4)], texts_a_prompt=2)
    parts = [events(index, text) for index, text in enumerate(("abc", "def", "ghi", "jkl"))]
    sent = b"".join(reply.take(event) for event in interleaved(*parts))
    assert reply.is_done
    found = Completion.model_validate_json(sent)
    assert [choice.text for choice in found.choices] == ["abc", "def", "ghi", "jkl"]
    assert found.usage is not None and (found.usage.prompt_tokens, found.usage.completion_tokens) == (8, 12)
    assert json.loads(sent)["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_completions_report_log_probabilities_with_offsets() -> None:
    shape = CompletionShape(Words(), "PQ")  # type: ignore[arg-type]
    reply = WholeReply(ENVELOPE, [shape], 1)
    first, *others = events(0, "ab", logprobs=True)
    prompt = (TokenLogprob(ord("P"), None), TokenLogprob(ord("Q"), -1.0, ((ord("Q"), -1.0),)))
    first = TokenEvent("r", "a", 0, None, 1, 2, 0, first.logprobs, prompt)
    sent = b"".join(reply.take(event) for event in (first, *others))
    choice = json.loads(sent)["choices"][0]
    assert choice["text"] == "PQab"
    assert choice["logprobs"] == {
        "tokens": ["P", "Q", "a", "b"],
        "token_logprobs": [None, -1.0, -0.5, -0.5],
        "top_logprobs": [None, {"Q": -1.0}, {"a": -0.5, "z": -2.0}, {"b": -0.5, "z": -2.0}],
        "text_offset": [0, 1, 2, 3],
    }


def test_a_token_that_is_none_of_the_likeliest_stands_beside_them() -> None:
    shape = CompletionShape(Words())  # type: ignore[arg-type]
    shape.add(TokenEvent("r", "a", 0, None, 1, 2, 0, (TokenLogprob(ord("a"), -3.0, ((ord("z"), -0.5),)),)))
    shape.add(TokenEvent("r", "b", 0, "stop", 2, 2, 0, (TokenLogprob(ord("b"), -4.0),)))  # logprobs: 0
    assert json.loads(shape.choice(0))["logprobs"]["top_logprobs"] == [{"z": -0.5, "a": -3.0}, {"b": -4.0}]


def chat_stream(shapes: list[ChatShape], script: list[TokenEvent], options: Any = None) -> list[ChatCompletionChunk]:
    reply = StreamReply(ENVELOPE, shapes, len(shapes), options)  # type: ignore[arg-type]
    frames = b"".join(reply.take(event) for event in script)
    assert reply.is_done
    return [ChatCompletionChunk.model_validate(chunk) for chunk in parse_stream(frames)]


def test_a_chat_stream_is_role_content_reason_and_usage() -> None:
    chunks = chat_stream([ChatShape(), ChatShape()], interleaved(events(0, "ab"), events(1, "cd", "length")),
                         StreamOptions(include_usage=True))  # fmt: skip
    *body, last = chunks
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 8
    assert all(chunk.usage is None for chunk in body)
    texts, reasons, roles = ["", ""], [None, None], [0, 0]
    for chunk in body:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert (texts, reasons, roles) == (["ab", "cd"], ["stop", "length"], [1, 1])


def test_usage_so_far_where_it_is_asked_for() -> None:
    chunks = chat_stream([ChatShape()], events(0, "abc"), StreamOptions(continuous_usage_stats=True))
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [1, 1, 2, 3, 3]


def test_log_probabilities_of_a_chat_stream_are_those_of_the_whole() -> None:
    script = events(0, "abc", logprobs=True)
    script.insert(1, TokenEvent("r", "", 0, None, 1, 4, 2, (TokenLogprob(0xE9, -1.5),)))  # held text, known token
    whole = WholeReply(ENVELOPE, [ChatShape(Words())], 1)  # type: ignore[arg-type]
    sent = b"".join(whole.take(event) for event in script)
    found = ChatCompletion.model_validate_json(sent)
    content = found.choices[0].logprobs.content  # type: ignore[union-attr]
    chunks = chat_stream([ChatShape(Words())], script)  # type: ignore[arg-type]
    streamed = [entry for chunk in chunks for c in chunk.choices if c.logprobs for entry in c.logprobs.content or []]
    assert content is not None and [entry.model_dump() for entry in content] == [e.model_dump() for e in streamed]
    assert [entry.token for entry in content] == ["a", "é", "b", "c"]
    assert content[1].bytes == [0xC3, 0xA9]


CALLED = 'Sure.<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_tool_calls_are_split_from_content_in_both_ways() -> None:
    whole = WholeReply(ENVELOPE, [ChatShape(calls=ToolCallText())], 1)
    found = ChatCompletion.model_validate_json(b"".join(whole.take(event) for event in events(0, CALLED)))
    message, reason = found.choices[0].message, found.choices[0].finish_reason
    assert reason == "tool_calls" and message.content == "Sure." and message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [("f", '{"x": 1}')]  # type: ignore[union-attr]
    chunks = chat_stream([ChatShape(calls=ToolCallText())], events(0, CALLED))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Sure."
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [(0, "f", '{"x": 1}')]  # type: ignore[union-attr]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_only_looks_like_a_call_stays_text() -> None:
    for text in ("a < b <tool", "<tool_call>no json</tool_call>", "<tool_call>[1]</tool_call>", "<tool_call>{"):
        parser, pieces = ToolCallText(), []
        for letter in text:
            pieces += parser.push(letter)
        pieces += parser.flush()
        assert "".join(str(piece) for piece in pieces) == text


@pytest.mark.parametrize(
    "arguments",
    ["[" * 100_000, "[" * 500 + "]" * 500, '"\\ud83d"', '{"\\udc00": 1}', "NaN", "1e999", "1" * 400, "1" * 5000],
    ids=lambda text: text[:9],
)
def test_a_call_that_cannot_be_sent_stays_text(arguments: str) -> None:
    """A model can be made to write it."""
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    whole = WholeReply(ENVELOPE, [ChatShape(calls=ToolCallText())], 1)
    sent = whole.take(TokenEvent("r", text, 0, "stop", 1, 1))
    assert json.loads(sent)["choices"][0]["message"]["content"] == text


def test_a_log_probability_that_json_cannot_write_is_a_very_small_one() -> None:
    entry = TokenLogprob(ord("a"), float("-inf"), ((ord("b"), float("nan")), (ord("c"), -1.0)))
    for shape in (CompletionShape(Words()), ChatShape(Words())):  # type: ignore[arg-type]
        shape.add(TokenEvent("r", "a", 0, "stop", 1, 1, 0, (entry,)))
        text = shape.choice(0).decode()
        assert "Infinity" not in text and "NaN" not in text and text.count("-9999.0") >= 2


def test_one_call_at_most_where_asked_for() -> None:
    whole = WholeReply(ENVELOPE, [ChatShape(calls=ToolCallText(), most_calls=1)], 1)
    sent = b"".join(whole.take(event) for event in events(0, CALLED + CALLED))
    assert len(json.loads(sent)["choices"][0]["message"]["tool_calls"]) == 1


def test_a_stream_that_breaks_says_so_and_ends() -> None:
    reply = StreamReply(ENVELOPE, [ChatShape()], 1, None)
    (error,) = parse_stream(reply.fail(RequestError("broke", status=500, kind="internal_error")))
    assert error["error"]["type"] == "internal_error"
