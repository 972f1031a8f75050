"""Tool calls through OpenAI's client: demanded, offered, answered; a grammar holds the small model to their form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Served

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(small: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=small.base_url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(client: openai.OpenAI, **parameters: Any) -> Any:
    defaults: dict[str, Any] = {"model": "small", "messages": QUESTION, "temperature": 0, "max_tokens": 120}
    return client.chat.completions.create(**{**defaults, "tools": [WEATHER, CLOCK], **parameters})


def check_call(function: Any) -> None:
    arguments = json.loads(function.arguments)
    if function.name == "get_weather":
        assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("C", "F")
    else:
        assert function.name == "get_time"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_is_made(client: openai.OpenAI, choice: Any) -> None:
    reply = ask(client, tool_choice=choice).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.content is None
    (call,) = reply.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function"
    check_call(call.function)
    assert choice == "required" or call.function.name == "get_weather"


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    whole = ask(client, tool_choice="required").choices[0].message.tool_calls[0].function
    chunks = [chunk.choices[0] for chunk in ask(client, tool_choice="required", stream=True)]
    (call,) = [call for choice in chunks for call in choice.delta.tool_calls or []]
    assert (call.function.name, call.function.arguments) == (whole.name, whole.arguments)
    assert chunks[-1].finish_reason == "tool_calls"


def test_an_answered_call_goes_on_as_text(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:30"},
    ]
    reply = ask(client, messages=[*QUESTION, *turns], tool_choice="none", max_tokens=8).choices[0]
    assert reply.message.tool_calls is None and reply.message.content


def test_offered_tools_leave_the_choice_to_the_model(client: openai.OpenAI) -> None:
    reply = ask(client, max_tokens=40).choices[0]
    assert reply.message.content or reply.message.tool_calls
    assert (reply.finish_reason == "tool_calls") is bool(reply.message.tool_calls and reply.finish_reason != "length")


def test_a_demand_that_cannot_be_met_is_refused(client: openai.OpenAI) -> None:
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    for parameters, param in (
        ({"tools": [broken], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **parameters)
        assert caught.value.param == param
