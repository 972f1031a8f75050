"""Bodies that ended the worker once, and others of their kinds: each is answered while a stream beside it goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import BEYOND, Served, Witness
from tests.support.schemas import ENDLESS, WRAPS, chain

TORCHSERVES_OWN = 6_553_500  # bytes that it takes of a worker at a time
LONGEST = 46_778  # SmolLM2's token of 81 characters
PLAIN, COMPLETIONS, CHAT = "", "/1.0/v1/completions", "/1.0/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/1.0/v1/tokenize", "/1.0/v1/detokenize"
USER = {"role": "user", "content": "hi"}
SAMPLED = {"prompt": "t1 t2", "max_new_tokens": 5, "temperature": 1}
PARAMETERS = "tools[0].function.parameters"
ARGUMENTS = "messages[1].tool_calls[0].function.arguments"
LIKELIEST = {"logprobs": True, "top_logprobs": 20}


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


def tool(**parts: Any) -> dict[str, Any]:
    return {"messages": [USER], "max_tokens": 2, "tools": [{"type": "function", "function": {"name": "f", **parts}}]}


def wants(schema: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return {"messages": [USER], "max_tokens": 2, "response_format": wanted}


def completion(schema: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 2, "response_format": wants(schema)["response_format"]}


def turn(arguments: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER], "max_tokens": 2}


CASES: list[tuple[str, str, Any, int, str | None]] = [
    # numbers
    ("top_k of 10^30", PLAIN, {**SAMPLED, "top_k": 10**30}, 200, None),
    ("top_k of 2^64", PLAIN, {**SAMPLED, "top_k": 2**64, "top_p": 0.5}, 200, None),
    ("top_k of 10^400", COMPLETIONS, {"prompt": "a", "max_tokens": 5, "top_k": 10**400}, 200, None),
    ("seed of 10^400", PLAIN, {**SAMPLED, "seed": 10**400}, 400, "seed"),
    ("temperature of 10^400", PLAIN, {**SAMPLED, "temperature": 10**400}, 400, "temperature"),
    ("bias of 10^30", PLAIN, {**SAMPLED, "logit_bias": {"1": 10**30}}, 400, "logit_bias.1"),
    ("bias of a token 10^30", PLAIN, {**SAMPLED, "logit_bias": {str(10**30): 1}}, 400, "logit_bias"),
    ("stop token 10^30", PLAIN, {**SAMPLED, "stop_token_ids": [10**30]}, 400, "stop_token_ids[0]"),
    ("min_tokens of 10^30", PLAIN, {**SAMPLED, "min_tokens": 10**30}, 400, "min_tokens"),
    ("length of 10^400", PLAIN, {**SAMPLED, "max_new_tokens": 10**400}, 400, "max_new_tokens"),
    ("penalty of 5e-324", PLAIN, {**SAMPLED, "repetition_penalty": 5e-324}, 400, "repetition_penalty"),
    ("ids of 10^30", COMPLETIONS, {"prompt": [10**30]}, 400, "prompt[0]"),
    ("texts of 10^30", CHAT, {"messages": [USER], "n": 10**30}, 400, "n"),
    # replies that are too large; the first ones that are not are `test_a_reply_above_what_torchserve_takes_at_once`
    ("echo of 45 MB", COMPLETIONS, {"prompt": [LONGEST] * 8000, "echo": True, "n": 70, "max_tokens": 0}, 400,
     "max_tokens"),
    ("echo of many prompts", COMPLETIONS, {"prompt": [[LONGEST] * 900] * 70, "echo": True, "max_tokens": 5000}, 400,
     "max_tokens"),
    ("logprobs of 80 texts", COMPLETIONS, {"prompt": "a", "n": 70, "max_tokens": 8000, "logprobs": 20}, 400,
     "max_tokens"),
    ("logprobs of chat", CHAT, {"messages": [USER], "n": 8, "max_tokens": 4000, **LIKELIEST}, 400, "max_tokens"),
    ("texts of 8000 tokens", CHAT, {"messages": [USER], "n": 70, "max_tokens": 8000}, 400, "max_tokens"),
    ("calls of 8000 tokens", CHAT, {**tool(), "n": 20, "max_tokens": 8000}, 400, "max_tokens"),
    ("ids without end", DETOKENIZE, {"tokens": [LONGEST] * 100_000}, 400, "tokens"),
    # tokens that the model does not have
    ("beyond, plain", PLAIN, {"prompt": f"a {BEYOND}"}, 400, "prompt"),
    ("beyond, messages", PLAIN, {"messages": [{"role": "user", "content": BEYOND}]}, 400, "messages"),
    ("beyond, second prompt", COMPLETIONS, {"prompt": ["a", BEYOND]}, 400, "prompt"),
    ("beyond, id", COMPLETIONS, {"prompt": [49_152]}, 400, "prompt"),
    ("beyond, chat", CHAT, {"messages": [{"role": "user", "content": f"{BEYOND}{BEYOND}"}]}, 400, "messages"),
    ("beyond, past call", CHAT, turn(json.dumps(BEYOND)), 400, "messages"),
    ("beyond, tool", CHAT, tool(description=BEYOND), 400, "messages"),
    ("beyond, echo", COMPLETIONS, {"prompt": BEYOND, "echo": True, "max_tokens": 0, "logprobs": 1}, 400, "prompt"),
    # work
    ("a megabyte of digits to tokenize", TOKENIZE, {"prompt": "7" * 1_000_000}, 400, "prompt"),
    ("a megabyte of spaces", TOKENIZE, {"prompt": " " * 1_000_000}, 400, "prompt"),
    ("a megabyte of digits as a prompt", PLAIN, {"prompt": "7" * 1_000_000}, 413, "prompt"),
    ("80 prompts of digits", COMPLETIONS, {"prompt": ["7" * 8000] * 79, "max_tokens": 1}, 400, "prompt"),
    ("26,000 messages", CHAT, {"messages": [USER] * 26_000}, 400, "messages"),
    ("26,000 messages to tokenize", TOKENIZE, {"messages": [USER] * 26_000}, 400, "messages"),
    ("a long stop string", PLAIN, {**SAMPLED, "stop": "x" * 100_000}, 400, "stop"),
    # schemas
    ("1,400 references", CHAT, wants(chain(1400, WRAPS["items"])), 400, "response_format"),
    ("1,400 references in parameters", CHAT, tool(parameters=chain(1400, WRAPS["items"])), 400, PARAMETERS),
    ("900 references by properties", COMPLETIONS, completion(chain(900, WRAPS["properties"])), 400,
     "response_format"),
    ("600 references by alternatives", CHAT, wants(chain(600, WRAPS["anyOf"])), 400, "response_format"),
    ("900 references of a demanded call", CHAT,
     {**tool(parameters=chain(900, WRAPS["prefixItems"])), "tool_choice": "required"}, 400, PARAMETERS),
    ("200 conditions", CHAT, wants(chain(200, WRAPS["if"])), 400, "response_format"),
    ("patterns that all hold", CHAT, wants(ENDLESS["patterns that all hold"]), 400, "response_format"),
    # JSON
    ("parameters 400 deep", CHAT, tool(parameters=deep(400)), 400,
     PARAMETERS + ".properties.a" * 2),
    ("parameters 90 deep", CHAT, tool(parameters=deep(45)), 400, PARAMETERS),
    ("parameters 60 deep", CHAT, tool(parameters=deep(30)), 200, None),
    ("a lone surrogate in parameters", CHAT, tool(parameters={"description": "\ud83d"}), 400,
     f"{PARAMETERS}.description"),
    ("a lone surrogate as a name", CHAT, tool(parameters={"\ud83d": {}}), 400, PARAMETERS),
    ("a lone surrogate as a member", CHAT, {"messages": [USER], "\ud83d": 1}, 400, None),
    ("arguments 100,000 deep", CHAT, turn("[" * 100_000), 400, ARGUMENTS),
    ("arguments with a lone surrogate", CHAT, turn('"\\ud83d"'), 400, ARGUMENTS),
    ("arguments without a number", CHAT, turn("[NaN]"), 400, f"{ARGUMENTS}[0]"),
]  # fmt: skip
RAW = {
    "100,000 deep": b"[" * 100_000,
    "100,000 deep and closed": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "10,000 digits": b'{"prompt": "a", "top_k": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "top_p": -Infinity}',
    "1e400": b'{"prompt": "a", "logit_bias": {"1": 1e400}}',
    "60,000 members": b"{" + b'"a%d":1,' * 60_000 % tuple(range(60_000)) + b'"prompt":"a"}',
    "300,000 lists": b'{"prompt": [' + b"[]," * 300_000 + b"[1]]}",
    "a lone surrogate": b'{"prompt": "\\udc00"}',
}


def post(served: Served, path: str, content: bytes, content_type: str = "application/json") -> httpx.Response:
    return httpx.post(served.url + path, content=content, headers={"content-type": content_type}, timeout=120)


@pytest.mark.parametrize(("path", "body", "status", "param"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_hostile_body_gets_its_answer(
    path: str, body: Any, status: int, param: str | None, tiny: Served, beside: Witness
) -> None:
    response = post(tiny, path, json.dumps(body).encode())
    assert response.status_code == status, response.text[:300]
    if status != 200:
        error = response.json()["error"]
        assert error["param"] == param and error["message"]
    assert len(beside.texts) <= 1, beside.texts


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "application/a+json"])
@pytest.mark.parametrize("name", RAW)
def test_hostile_json_is_a_400_whoever_parses_it(name: str, content_type: str, tiny: Served, beside: Witness) -> None:
    """TorchServe parses the plain type itself, the handler the others."""
    for path in (PLAIN, COMPLETIONS, TOKENIZE):
        response = post(tiny, path, RAW[name], content_type)
        assert response.status_code == 400, response.text[:300]
        assert response.json()["error"]["message"]
    assert len(beside.texts) <= 1, beside.texts


@pytest.mark.parametrize(
    ("path", "body", "texts"),
    [
        (CHAT, {"messages": [USER], "n": 16, "max_tokens": 245, "ignore_eos": True, "temperature": 1, **LIKELIEST}, 16),
        (COMPLETIONS, {"prompt": [LONGEST] * 4000, "echo": True, "n": 22, "max_tokens": 0}, 22),
    ],
    ids=["logprobs", "echo"],
)
def test_a_reply_above_what_torchserve_takes_at_once_arrives_whole(
    path: str, body: dict[str, Any], texts: int, tiny: Served, beside: Witness
) -> None:
    response = post(tiny, path, json.dumps(body).encode())
    assert response.status_code == 200, response.text[:300]
    assert len(response.content) > TORCHSERVES_OWN
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(texts))
    assert all(choice["finish_reason"] == "length" for choice in choices)
    if path == CHAT:
        assert all(len(choice["logprobs"]["content"]) == 245 for choice in choices)
    assert len(beside.texts) <= 1, beside.texts
