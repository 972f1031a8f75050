"""Each bound of a body: what is at it is taken, what is beyond it is a 400 that names the member, and quickly so."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from dsserve.core.errors import RequestError
from dsserve.core.request import Limits
from dsserve.protocol import bounds
from dsserve.protocol.routes import answer
from dsserve.protocol.served import ServedModel
from tests.contract.rank0 import make_tokenizer, served_model

HUGE = (2**63, 2**64, 10**30, 10**400)
USER = {"role": "user", "content": "hello"}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{{ tools | tojson if tools }}<tool_call>"
PATHS = {"plain": "", "completions": "v1/completions", "chat": "v1/chat/completions",
         "tokenize": "v1/tokenize", "detokenize": "v1/detokenize"}  # fmt: skip
LEAST: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "hello"}, "completions": {"prompt": "hello"}, "chat": {"messages": [USER]},
    "tokenize": {"prompt": "hello"}, "detokenize": {"tokens": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> ServedModel:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<beyond>"])  # id 3
    model = served_model(tokenizer, Limits(64, 16, 32, max_running=2, max_waiting=126, max_stops=64))
    object.__setattr__(model, "vocabulary", 3)
    return model


def ask(served: ServedModel, endpoint: str, body: Any) -> Any:
    return answer(PATHS[endpoint], "r", {"body": body}, "application/json", served)


def refusal(served: ServedModel, endpoint: str, body: Any) -> RequestError:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        ask(served, endpoint, body)
    assert time.monotonic() - started < 5  # of a machine that does much beside
    return caught.value


def member_of(error: RequestError) -> str:
    """The body's member that an error is about; what any JSON must be is said of a place within it."""
    return re.split(r"[.\[]", str(error.param))[0]


@pytest.mark.parametrize("number", [*HUGE, -(2**64), -(10**400), 1e308, -1e308])
@pytest.mark.parametrize("endpoint", ["plain", "completions", "chat"])
def test_no_number_of_any_size_passes_or_raises(served: ServedModel, endpoint: str, number: float) -> None:
    length = {"plain": "max_new_tokens", "completions": "max_tokens", "chat": "max_completion_tokens"}[endpoint]
    names = [
        length, "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "min_tokens", "timeout", *(["n"] if endpoint != "plain" else []),
    ]  # fmt: skip
    for name in names:
        error = refusal(served, endpoint, {**LEAST[endpoint], name: number})
        assert error.status == 400 and member_of(error) == name and len(error.message) < 300, name
    for name, value in (("logit_bias", {"1": number}), ("stop_token_ids", [number])):
        error = refusal(served, endpoint, {**LEAST[endpoint], name: value})
        assert error.status == 400 and member_of(error) == name
    keys = {"logit_bias": {str(number): 1}}
    assert member_of(refusal(served, endpoint, {**LEAST[endpoint], **keys})) == "logit_bias"


@pytest.mark.parametrize("number", [3, 2**31, *HUGE])
def test_a_top_k_above_the_vocabulary_is_off(served: ServedModel, number: int) -> None:
    for endpoint in ("plain", "completions", "chat"):
        job = ask(served, endpoint, {**LEAST[endpoint], "top_k": number})
        assert job.requests[0].sampling.top_k is None
    assert ask(served, "plain", {"prompt": "hello", "top_k": 2}).requests[0].sampling.top_k == 2


def test_a_factor_that_overflows_what_it_divides_is_refused(served: ServedModel) -> None:
    for factor in (0, 5e-324, 1e-300, 0.009):
        assert refusal(served, "plain", {"prompt": "hello", "repetition_penalty": factor}).param == "repetition_penalty"
    ask(served, "plain", {"prompt": "hello", "repetition_penalty": bounds.LEAST_REPETITION_PENALTY})


def call(**parts: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, **parts}


def tool(**parts: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **parts}}


def parts(count: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": ""}] * count}


def turn(*calls: dict[str, Any]) -> list[Any]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": list(calls)}]


# What is just within: the endpoint, the member, its value; and the same just beyond.
EDGES: list[tuple[str, str, Any, Any]] = [
    ("plain", "stop", "x" * 1024, "x" * 1025),
    ("chat", "stop", ["x" * 1024] * 64, ["y", "x" * 1025]),
    ("chat", "stop", ["x"] * 64, ["x"] * 65),
    ("chat", "stop_token_ids", [1] * 64, [1] * 65),
    ("plain", "messages", [USER] * 30, [USER] * 2049),
    ("chat", "messages", [USER] * 30, [USER] * 2049),
    ("tokenize", "messages", [USER] * 30, [USER] * 2049),
    ("chat", "messages", [parts(2000), USER, parts(48)], [parts(2000), USER, parts(49)]),
    ("chat", "messages", [{**USER, "name": "n" * 256}], [{**USER, "name": "n" * 257}]),
    ("chat", "messages", turn(*[call()] * 1024) * 2, turn(*[call()] * 1025) * 2),
    ("chat", "messages", turn(call(id="i" * 1024)), turn(call(id="i" * 1025))),
    ("chat", "messages", turn(call(function={"name": "n" * 256, "arguments": "{}"})),
     turn(call(function={"name": "n" * 257, "arguments": "{}"}))),
    ("chat", "messages", [USER, {"role": "tool", "content": "", "tool_call_id": "i" * 1024}],
     [USER, {"role": "tool", "content": "", "tool_call_id": "i" * 1025}]),
    ("chat", "messages", turn(call(function={"name": "f", "arguments": "[" * 100 + "]" * 100})),
     turn(call(function={"name": "f", "arguments": "[" * 101 + "]" * 101}))),
    ("chat", "user", "u" * 1024, "u" * 1025),
    ("completions", "user", "u" * 1024, "u" * 1025),
    ("chat", "tools", [tool()] * 128, [tool()] * 129),
    ("chat", "tools", [tool(name="f" * 64)], [tool(name="f" * 65)]),
    ("chat", "tools", [tool(description="d")], [tool(description="d" * 65_537)]),
    ("completions", "logprobs", 20, 21),
    ("chat", "n", 128, 129),
    ("completions", "prompt", [[1] * 48] * 128, [[1] * 600] * 128),
    ("detokenize", "tokens", [2] * 64, [2] * 65),
    ("detokenize", "tokens", [2], [3]),
    ("completions", "prompt", [2], [3]),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "name", "within", "beyond"), EDGES)
def test_what_is_at_a_bound_is_taken_and_more_is_refused(
    served: ServedModel, endpoint: str, name: str, within: Any, beyond: Any
) -> None:
    least = {} if name in ("messages", "prompt") else LEAST[endpoint]
    choice = {"tool_choice": "none"} if name == "tools" else {}
    ask(served, endpoint, {**least, **choice, name: within})
    error = refusal(served, endpoint, {**least, **choice, name: beyond})
    assert error.status == 400 and error.message and len(error.message) < 300
    assert member_of(error) == name


BAD_ARGUMENTS = [
    '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud83d"}', "[" * 100_000, "1" * 5000, '{"a": ' + "1" * 400 + "}",
    "{", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=lambda text: text[:12])
def test_arguments_of_a_past_call_are_within_the_bounds_of_json(served: ServedModel, arguments: str) -> None:
    body = {"messages": turn(call(function={"name": "f", "arguments": arguments}))}
    for endpoint in ("chat", "tokenize"):
        error = refusal(served, endpoint, body)
        assert error.status == 400 and str(error.param).startswith("messages[1].tool_calls[0].function.arguments")


def test_tools_parameters_are_within_the_bounds_of_json(served: ServedModel) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}}
    for parameters in (deep, {"description": "\ud83d"}, {"\ud83d": 1}, {"minimum": 10**400}, {"maximum": float("inf")}):
        for choice in ("none", "auto", "required"):
            body = {**LEAST["chat"], "tools": [tool(parameters=parameters)], "tool_choice": choice}
            error = refusal(served, "chat", body)
            assert error.status == 400 and str(error.param).startswith("tools[0].function.parameters")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{f"m{at}": 1 for at in range(100_000)}]},
        {**{f"m{at}": 1 for at in range(100_000)}, **LEAST["chat"]},
        {"messages": [{"role": 5}] * 100_000},
        {"messages": [USER], "stop_token_ids": ["x"] * 100_000},
        {"messages": [USER], "logit_bias": {str(at): 1 for at in range(100_000)}},
        {"messages": [USER], "tools": [{}] * 100_000},
        {"messages": [USER], "x": [[]] * 1_000_000},
    ],
    ids=["members", "fields", "roles", "ids", "keys", "tools", "lists"],
)
def test_a_hundred_thousand_faults_are_one_complaint(served: ServedModel, body: dict[str, Any]) -> None:
    assert refusal(served, "chat", body).status == 400


def test_a_token_that_the_model_does_not_have_is_refused_however_it_comes(served: ServedModel) -> None:
    text = {"role": "user", "content": "hello <beyond>"}
    for endpoint, body, param in (
        ("plain", "hello <beyond>", "prompt"),
        ("plain", {"prompt": "hello <beyond> world"}, "prompt"),
        ("plain", {"messages": [text]}, "messages"),
        ("completions", {"prompt": "<beyond>"}, "prompt"),
        ("completions", {"prompt": ["hello", "<beyond>"]}, "prompt"),
        ("completions", {"prompt": [3]}, "prompt"),
        ("completions", {"prompt": [[1], [2, 3]]}, "prompt"),
        ("chat", {"messages": [text]}, "messages"),
        ("chat", {"messages": [*turn(call(function={"name": "f", "arguments": '"<beyond>"'})), text]}, "messages"),
        ("tokenize", {"prompt": "<beyond>"}, "prompt"),
        ("tokenize", {"messages": [text]}, "messages"),
        ("detokenize", {"tokens": [1, 3]}, "tokens"),
    ):
        kind = "text/plain" if isinstance(body, str) else "application/json"
        with pytest.raises(RequestError) as caught:
            answer(PATHS[endpoint], "r", {"body": body}, kind, served)
        assert caught.value.status == 400 and caught.value.param == param
        assert "0 to 2" in caught.value.message


def test_a_template_that_fails_in_any_way_is_a_400(served: ServedModel) -> None:
    tokenizer = served.tokenizer
    deep = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
    for template in (deep, "{{ 1 // 0 }}", "{{ messages[0].content.nothing.more }}", "{{ messages | sum }}"):
        tokenizer.chat_template = template
        assert refusal(served, "chat", LEAST["chat"]).param == "messages"
    tokenizer.chat_template = TEMPLATE
