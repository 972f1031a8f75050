"""Bodies under `v1/`: what is taken, what is refused and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from dsserve.core.errors import RequestError
from dsserve.protocol.openai.schema import ChatBody, CompletionBody, parse
from dsserve.protocol.openai.tokenizer_endpoints import TokenizeBody

USER = [{"role": "user", "content": "a"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_a_prompt_has_four_shapes(prompt: Any) -> None:
    assert parse(CompletionBody, {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": ["a", 1]}, "prompt", "not mixed"),
        ({"prompt": [[]]}, "prompt", "none empty"),
        ({"prompt": [-1]}, "prompt", "not mixed"),
        ({"prompt": [True]}, "prompt", "not mixed"),
        ({"prompt": 5}, "prompt", "a list of token ids"),
        ({"prompt": "a", "max_tokens": 0}, None, "echo"),
        ({"prompt": "a", "echo": True, "stream": True}, None, "echo"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ({"prompt": "a", "best_of": 2}, "best_of", "best_of: not supported; ask for n"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "n": 0}, "n", "1"),
        ({"prompt": "a", "n": 129}, "n", "128"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, None, "stream: true"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "100"),
        ({"prompt": "a", "logit_bias": {"1": float("inf")}}, "logit_bias", "finite"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "2"),
        ({"prompt": "a", "presence_penalty": -3}, "presence_penalty", "-2"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", "holds json_schema"),
        ({"prompt": "a", "response_format": {"type": "json_object"}, "ignore_eos": True}, None, "ignore_eos"),
    ],
)
def test_a_wrong_completion_is_named(body: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, body)
    assert caught.value.status == 400 and caught.value.param == param and words in caught.value.message


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "text model",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "tool_call_id"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages", "only assistant"),
        ({"messages": USER, "top_logprobs": 2}, None, "logprobs: true"),
        ({"messages": USER, "max_tokens": 2, "max_completion_tokens": 3}, None, "differ"),
        ({"messages": USER, "tool_choice": "required"}, None, "needs tools"),
        ({"messages": USER, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        (
            {"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            None,
            "not among",
        ),
        ({"messages": USER, "functions": []}, "functions", "tools"),
        ({"messages": USER, "prompt": "a"}, "prompt", "chat takes messages"),
    ],
)
def test_a_wrong_chat_is_named(body: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatBody, body)
    assert caught.value.status == 400 and caught.value.param == param and words in caught.value.message


def test_null_is_left_out_everywhere() -> None:
    body = {"messages": [{"role": "user", "content": "a", "name": None}], "stop": None, "tools": None, "n": None}
    assert parse(ChatBody, body) == parse(ChatBody, {"messages": USER})
    call = {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    assert parse(ChatBody, call).messages[0].content is None


def test_no_value_of_the_client_is_repeated() -> None:
    for body in ({"prompt": {"SECRET": 1}}, {"prompt": "a", "seed": "SECRET"}, {"prompt": "a", "stop": [["SECRET"]]}):
        with pytest.raises(RequestError) as caught:
            parse(CompletionBody, body)
        assert "SECRET" not in caught.value.message


def test_tokenize_takes_one_source() -> None:
    assert parse(TokenizeBody, {"prompt": ""}).prompt == ""
    with pytest.raises(RequestError, match="exactly one"):
        parse(TokenizeBody, {"prompt": "a", "messages": USER})


@pytest.mark.parametrize("member", [{"cache_salt": "tenant 7"}, {"priority": -3}])
def test_what_orders_and_separates_requests_reaches_the_engine(member: dict[str, Any]) -> None:
    (name, value), body = next(iter(member.items())), {"prompt": "a", **member}
    assert getattr(parse(CompletionBody, body), name) == value
    for wrong in ({"cache_salt": ""}, {"cache_salt": "a" * 1025}, {"priority": 2**31}, {"priority": 1.5}):
        with pytest.raises(RequestError):
            parse(CompletionBody, {"prompt": "a", **wrong})
