"""Bodies to requests and tokens to replies, without TorchServe and without a model."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dsserve.errors import RequestError
from dsserve.generation.request import Limits, SamplingParams, Usage
from dsserve.protocol.prompt import build_request, encode_prompt
from dsserve.protocol.reply import JsonReply, PlainReply, SseReply, make_reply
from dsserve.protocol.rows import read_body
from dsserve.protocol.schema import GenerateBody, parse_body

LIMITS = Limits(max_model_len=32, max_new_tokens_default=16, max_new_tokens_limit=24)
JSON = "application/json"
TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}
{{- raise_exception('system comes first') }}{% endif %} {{ m.content }} [SEP]{% endfor %}"""


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One word a token; adds a BOS of its own, as Llama's does."""
    words = ["[BOS]", "[SEP]", "[UNK]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]", sep_token="[SEP]")
    fast.chat_template = template
    return fast


def refusal(call: Any, *arguments: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value


# --- rows


def test_a_text_body_is_the_prompt() -> None:
    assert read_body({"body": b"caf\xc3\xa9"}, "text/plain") == "café"
    assert read_body({"body": b'{"prompt": "a"}'}, None) == '{"prompt": "a"}'
    assert read_body({"data": "a form's field"}, None) == "a form's field"


def test_a_json_body_is_an_object_parsed_by_torchserve_or_not() -> None:
    assert read_body({"body": {"prompt": "a"}}, JSON) == {"prompt": "a"}
    assert read_body({"body": b'{"prompt": "a"}'}, JSON) == {"prompt": "a"}
    assert read_body({"body": b'{"prompt": "a"}'}, "application/vnd.api+json") == {"prompt": "a"}


@pytest.mark.parametrize(
    ("row", "content_type", "words"),
    [
        ({}, None, "no request body"),
        ({"What is?": b""}, None, "no request body"),
        ({"body": b""}, "text/plain", "is empty"),
        ({"body": b""}, JSON, "is empty"),
        ({"body": b"{"}, JSON, "not valid JSON"),
        ({"body": b"[" * 200_000}, JSON, "nested too deeply"),
        ({"body": b"\xff\xfe"}, "text/plain", "not UTF-8"),
        ({"body": b'"\xff"'}, JSON, "not UTF-8"),
        ({"body": b"[1]"}, JSON, "found an array"),
        ({"body": b'"a"'}, JSON, "found a string"),
        ({"body": b"null"}, JSON, "found null"),
        ({"body": "a", "other": "b"}, None, "put them into the JSON body"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(row: dict[str, Any], content_type: str | None, words: str) -> None:
    error = refusal(read_body, row, content_type)
    assert error.status == 400 and words in error.message


@given(st.binary(max_size=60), st.sampled_from([JSON, "text/plain", None]))
def test_no_bytes_raise_anything_else(body: bytes, content_type: str | None) -> None:
    with contextlib.suppress(RequestError):
        assert isinstance(read_body({"body": body}, content_type), (str, dict))


# --- schema


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, None, "exactly one of `prompt`"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, None, "exactly one of `prompt`"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": ["a"]}, "prompt", "string"),
        ({"prompt": "\ud800"}, "prompt", "not valid Unicode"),
        ({"messages": [{"role": "user", "content": "a\udfff"}]}, "messages", "not valid Unicode"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "b"}]}, "messages", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": "b", "name": "x"}]}, "messages", "a message holds"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "max_new_tokens", "integer"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens", "integer"),
        ({"prompt": "a", "max_new_tokens": "5"}, "max_new_tokens", "integer"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature", "finite"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"prompt": "a", "top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"prompt": "a", "seed": 2**63}, "seed", "less than or equal to"),
        ({"prompt": "a", "stop": ""}, "stop", "must not be empty"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop", "must not be empty"),
        ({"prompt": "a", "stop": "\ud800"}, "stop", "not valid Unicode"),
        ({"prompt": "a", "stop": list("abcde")}, "stop", "at most 4"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens", "did you mean max_new_tokens?"),
        ({"prompt": "a", "nonsense": 5}, "nonsense", "Allowed: prompt, messages, max_new_tokens"),
    ],
)
def test_a_wrong_parameter_is_named(body: dict[str, Any], param: str | None, words: str) -> None:
    error = refusal(parse_body, body)
    assert error.status == 400 and error.param == param
    assert words in error.message


def test_an_error_repeats_no_value_of_the_client() -> None:
    for body in ({"prompt": 5, "seed": "SECRET"}, {"prompt": "a", "stop": [["SECRET"]]}, {"prompt": {"SECRET": 1}}):
        assert "SECRET" not in refusal(parse_body, body).message


def test_one_stop_string_is_a_list_and_top_k_off_is_none() -> None:
    body = parse_body({"prompt": "a", "stop": "x", "top_k": -1, "temperature": 1})
    assert isinstance(body, GenerateBody)
    assert body.stop == ["x"] and body.top_k is None and body.temperature == 1.0


# --- prompt


def test_a_prompt_gets_the_tokenizers_bos_and_the_defaults() -> None:
    request = build_request("r", "a b", make_tokenizer(), LIMITS)
    assert request.prompt_ids == (0, 3, 4)
    assert request.max_new_tokens == 16 and request.sampling == SamplingParams() and request.stop == ()


def test_messages_get_the_templates_bos_alone() -> None:
    body = GenerateBody(messages=[{"role": "user", "content": "a"}])  # type: ignore[list-item]
    assert encode_prompt(body, make_tokenizer()) == [0, 3, 1]


def test_every_parameter_reaches_the_engine() -> None:
    body = parse_body({"prompt": "a", "max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 7})
    request = build_request("r", body, make_tokenizer(), LIMITS)
    assert request.max_new_tokens == 3
    assert request.sampling == SamplingParams(0.5, 4, 0.9, 7)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "a " * 31}, 413, "the prompt has 32 tokens"),
        ({"prompt": "a " * 20, "max_new_tokens": 12}, 413, "ask for at most 11"),
        ({"prompt": "a", "max_new_tokens": 25}, 400, "at most 24"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(body: dict[str, Any], status: int, words: str) -> None:
    error = refusal(build_request, "r", parse_body(body), make_tokenizer(), LIMITS)
    assert error.status == status and words in error.message


def test_the_default_is_cut_to_what_fits() -> None:
    assert build_request("r", "a " * 30, make_tokenizer(), LIMITS).max_new_tokens == 1
    assert build_request("r", parse_body({"prompt": "a " * 20, "max_new_tokens": 11}), make_tokenizer(), LIMITS)


def test_messages_that_the_template_cannot_take_are_refused() -> None:
    one = {"role": "user", "content": "a"}
    late_system = [one, {"role": "system", "content": "b"}]
    error = refusal(encode_prompt, parse_body({"messages": late_system}), make_tokenizer())
    assert "system comes first" in error.message and error.param == "messages"
    error = refusal(encode_prompt, parse_body({"messages": [one]}), make_tokenizer(template=None))
    assert "no chat template" in error.message


# --- reply

USAGE = Usage(2, 3)


def test_the_kind_of_reply_follows_the_body() -> None:
    assert isinstance(make_reply("text"), PlainReply)
    assert isinstance(make_reply(GenerateBody(prompt="a")), JsonReply)
    assert isinstance(make_reply(GenerateBody(prompt="a", stream=True)), SseReply)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6))
def test_each_kind_carries_the_same_text(pieces: list[str]) -> None:
    pieces = [piece.encode("utf-8", "replace").decode() for piece in pieces]
    sent = {}
    for reply in (PlainReply(), JsonReply(), SseReply()):
        frames = [reply.delta(piece) for piece in pieces[:-1]]
        sent[type(reply)] = b"".join([*frames, reply.finish(pieces[-1], "stop", USAGE)]).decode()
    text = "".join(pieces)
    assert sent[PlainReply] == text
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert json.loads(sent[JsonReply]) == {"text": text, "finish_reason": "stop", "usage": usage}
    events = sent[SseReply].split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(body["text"] for body in bodies) == text
    assert bodies[-1] == {"text": "", "finish_reason": "stop", "usage": usage}


def test_a_stream_that_breaks_says_so_and_ends() -> None:
    frames = SseReply().fail(RequestError("broke", status=500, kind="internal_error")).decode().split("\n\n")
    assert json.loads(frames[0].removeprefix("data: "))["error"]["type"] == "internal_error"
    assert frames[1:] == ["data: [DONE]", ""]
