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

from dsserve.core.errors import RequestError
from dsserve.core.request import GenerationRequest, Limits, SamplingParams, StopConditions, TokenEvent
from dsserve.protocol.plain_endpoint import generate
from dsserve.protocol.prompt import encode_messages
from dsserve.protocol.reply import JsonReply, PlainReply, SseReply
from dsserve.protocol.rows import read_body
from dsserve.protocol.schema import GenerateBody, parse_body
from dsserve.protocol.served import ServedModel
from dsserve.sampling.grammar import GrammarCompiler

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


def served(tokenizer: PreTrainedTokenizerFast | None = None) -> ServedModel:
    tokenizer = tokenizer or make_tokenizer()
    return ServedModel("test", tokenizer, LIMITS, 11, GrammarCompiler(tokenizer, 11, frozenset()))


def build(body: str | dict[str, Any]) -> GenerationRequest:
    (request,) = generate("r", body, served()).requests
    return request


def refusal(call: Any, *arguments: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value


# --- rows


def test_a_text_body_is_the_prompt() -> None:
    assert read_body({"body": b"caf\xc3\xa9"}, "text/plain") == "café"
    assert read_body({"body": b"a"}, None) == read_body({"body": b"a"}, "application/octet-stream") == "a"
    assert read_body({"body": b'{"prompt": "a"}'}, "text/plain") == '{"prompt": "a"}'
    assert read_body({"body": b'{"a" is no JSON'}, None) == '{"a" is no JSON'
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
        ({"body": b'{"seed": ' + b"1" * 5000 + b"}"}, JSON, "thousands of digits"),
        ({"body": b"\xff\xfe"}, "text/plain", "not UTF-8"),
        ({"body": b'"\xff"'}, JSON, "not UTF-8"),
        ({"body": b"[1]"}, JSON, "found an array"),
        ({"body": b'"a"'}, JSON, "found a string"),
        ({"body": b"null"}, JSON, "found null"),
        ({"body": b' {"prompt": "a"}'}, None, "without a content type"),
        ({"body": b'{"prompt": "a"}'}, "application/octet-stream", "-H 'Content-Type: application/json'"),
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
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "b"}]}, "messages", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": "b", "name": "x"}]}, "messages", "name: unknown"),
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
        ({"prompt": "a", "stop": ["a"] * 65}, "stop", "at most 64"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens", "did you mean max_new_tokens?"),
        ({"prompt": "a", "nonsense": 5}, "nonsense", "nonsense: unknown parameter. Allowed: temperature, top_p"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", 'keys must be token ids, like "17"'),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
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
    assert body.stop == ["x"] and body.sampling(11).top_k is None and body.temperature == 1.0


# --- prompt


def test_a_prompt_gets_the_tokenizers_bos_and_the_defaults() -> None:
    request = build("a b")
    assert request.prompt_ids == (0, 3, 4)
    assert request.max_new_tokens == 16 and request.sampling == SamplingParams() and request.stop == StopConditions()


def test_messages_get_the_templates_bos_alone() -> None:
    assert encode_messages([{"role": "user", "content": "a"}], served()) == [0, 3, 1]
    assert build({"messages": [{"role": "user", "content": "a"}]}).prompt_ids == (0, 3, 1)


def test_every_parameter_reaches_the_engine() -> None:
    sampling = {
        "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": -7, "min_tokens": 2,
    }  # fmt: skip
    stops = {"stop": "x", "stop_token_ids": [4, 5], "ignore_eos": True}
    request = build({"prompt": "a", "max_new_tokens": 3, **sampling, **stops, "logit_bias": {"7": -100}})
    assert request.max_new_tokens == 3
    assert request.sampling == SamplingParams(**sampling, logit_bias={7: -100.0})  # type: ignore[arg-type]
    assert request.stop == StopConditions(("x",), frozenset({4, 5}), True)


def test_null_is_left_out() -> None:
    assert build({"prompt": "a", "stop": None, "seed": None, "max_new_tokens": None}) == build({"prompt": "a"})


@pytest.mark.parametrize(
    ("body", "param"),
    [({"logit_bias": {"11": 1}}, "logit_bias"), ({"stop_token_ids": [11]}, "stop_token_ids"),
     ({"stop": list("abcde")}, "stop"),
     ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens")],
)  # fmt: skip
def test_what_the_model_or_the_request_cannot_have_is_refused(body: dict[str, Any], param: str) -> None:
    assert refusal(build, {"prompt": "a", **body}).param == param


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "a " * 31}, 413, "the prompt has 32 tokens"),
        ({"prompt": "a " * 20, "max_new_tokens": 12}, 413, "ask for at most 11"),
        ({"prompt": "a", "max_new_tokens": 25}, 400, "at most 24"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(body: dict[str, Any], status: int, words: str) -> None:
    error = refusal(build, body)
    assert error.status == status and words in error.message


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_far_above_the_context_is_not_tokenized_whole(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte takes a second, and every stream waits for it."""
    tokenizer, read = make_tokenizer(), 0
    original = type(tokenizer).__call__

    def count(self: Any, text: str, **options: Any) -> Any:
        nonlocal read
        read += len(text)
        return original(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    text = "a " * 30_000
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    error = refusal(generate, "r", body, served(tokenizer))
    assert error.status == 413 and error.param == next(iter(body)) and "more than 64 tokens" in error.message
    assert read < 1000
    spaces = "a" + " " * 5000 + "b"  # many characters, few tokens
    (request,) = generate("r", spaces, served(tokenizer)).requests
    assert request.prompt_ids == (0, 3, 4)


def test_the_default_is_cut_to_what_fits() -> None:
    assert build("a " * 30).max_new_tokens == 1
    assert build({"prompt": "a " * 20, "max_new_tokens": 11}).max_new_tokens == 11


def test_messages_that_the_template_cannot_take_are_refused() -> None:
    one = {"role": "user", "content": "a"}
    late_system = [one, {"role": "system", "content": "b"}]
    error = refusal(build, {"messages": late_system})
    assert "system comes first" in error.message and error.param == "messages"
    error = refusal(generate, "r", {"messages": [one]}, served(make_tokenizer(template=None)))
    assert "no chat template" in error.message


# --- reply


def test_the_kind_of_reply_follows_the_body() -> None:
    for body, kind in (("a", PlainReply), ({"prompt": "a"}, JsonReply), ({"prompt": "a", "stream": True}, SseReply)):
        assert type(generate("r", body, served()).reply) is kind


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6))
def test_each_kind_carries_the_same_text(pieces: list[str]) -> None:
    pieces = [piece.encode("utf-8", "replace").decode() for piece in pieces]
    sent = {}
    for reply in (PlainReply(), JsonReply(), SseReply()):
        frames = [reply.take(TokenEvent("r", piece)) for piece in pieces[:-1]]
        last = TokenEvent("r", pieces[-1], 0, "stop", completion_tokens=3, prompt_tokens=2, cached_tokens=1)
        sent[type(reply)] = b"".join([*frames, reply.take(last)]).decode()
        assert reply.is_done
    text = "".join(pieces)
    assert sent[PlainReply] == text
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    usage["prompt_tokens_details"] = {"cached_tokens": 1}  # type: ignore[assignment]
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
