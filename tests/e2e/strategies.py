"""Hypothesis strategies for bodies of the endpoints: valid ones, and the same with one thing wrong, huge or strange.

What can end a worker is in each of them: numbers of any size, strings up to a body's limit, depth, replies that would
be larger than may be sent, tokens that the model does not have, tools and the calls of earlier turns.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.e2e.conftest import BEYOND

MODEL = "tiny"
VOCABULARY = 49_152
END = 2  # SmolLM2's end-of-text token
# TorchServe's limit of a body is 1 MiB here; JSON spells a character beyond ASCII with 6 bytes.
LONG = [
    "7" * 1_000_000,
    "a" * 1_000_000,
    " " * 1_000_000,
    "\n" * 400_000,
    "日" * 150_000,
    '"' * 400_000,
    "x y " * 20_000,
]
_ODD = ["Hello", "One, two,", "", "\ud800", "日本", "\x00", "a\n[METRICS]x", BEYOND, f"a {BEYOND}"]
TEXT = (
    st.text(max_size=12)
    | st.text(max_size=12)
    | st.text(max_size=12)
    | st.sampled_from([*_ODD, *LONG, "x" * 257, "x" * 1025, "x" * 65_537])
)
SHORT = st.text(min_size=1, max_size=8)
BIG = [2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**400), 1e308, -1e308, 5e-324]
BIG += [float("nan"), float("inf"), float("-inf")]
NUMBER = (
    st.integers(-3, 60) | st.floats(-3, 3) | st.sampled_from([*BIG, 0.0, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1])
)


def _nested(parts: tuple[int, bool, Any]) -> Any:
    levels, of_objects, value = parts
    for _ in range(levels):
        value = {"a": value} if of_objects else [value]
    return value


DEEP = st.tuples(st.sampled_from([90, 99, 100, 101, 400, 900]), st.booleans(), st.just(1)).map(_nested)
JSON = (
    st.recursive(
        st.none() | st.booleans() | NUMBER | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    )
    | DEEP
)

SCHEMA = st.recursive(
    st.sampled_from(
        [{}, {"type": "integer"}, {"enum": ["a", 1]}, {"const": "\U0001f642"}, {"$ref": "#"}, {"type": "nonsense"},
         {"type": "string", "pattern": "^(a|b){2,9}$"}, {"type": "string", "format": "date", "maxLength": 3},
         {"description": "\ud83d"}]
    )
    | NUMBER.map(lambda number: {"type": "number", "multipleOf": number})
    | st.tuples(NUMBER, NUMBER).map(lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).flatmap(
            lambda parts: st.sampled_from(["anyOf", "allOf", "oneOf"]).map(lambda word: {word: parts})
        ),
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1}),
        st.dictionaries(TEXT, inner, max_size=3).map(lambda of: {"properties": of, "required": list(of)}),
    ),
    max_leaves=5,
)  # fmt: skip
FORMAT = SCHEMA.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})

_SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 60_000) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400]),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.01, 1),
    "repetition_penalty": st.floats(0.01, 10),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=3)
    | st.lists(st.text(min_size=1, max_size=3), max_size=4)
    | st.sampled_from([1023, 1024, 1025, 100_000]).map(lambda length: "x" * length),
    "stop_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 3),
    "timeout": st.floats(60, 600),
}
_V1 = {
    "model": st.sampled_from([MODEL, "other"]),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | FORMAT,
    "user": SHORT | SHORT | TEXT,
}
_USER = {"role": "user", "content": "a"}
_ARGUMENTS = JSON.map(json.dumps) | TEXT | st.sampled_from(["{}", "", "[" * 100_000, '{"a": NaN}', '"\\ud83d"'])
_CALL = st.fixed_dictionaries(
    {
        "id": SHORT,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": SHORT, "arguments": _ARGUMENTS}),
    }
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT | st.none()},
    optional={"name": TEXT},
)
_CALLING = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none(), "tool_calls": st.lists(_CALL, min_size=1, max_size=2)}
)
_ANSWER = st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "tool_call_id": SHORT})
_PLAIN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": SHORT})
MESSAGES = st.one_of(
    st.lists(_PLAIN, min_size=1, max_size=3),
    st.lists(_PLAIN, min_size=1, max_size=3),
    st.lists(_MESSAGE, min_size=1, max_size=3),
    st.tuples(_MESSAGE, _CALLING, _ANSWER).map(list),
    st.sampled_from([2048, 2049, 20_000]).map(lambda count: [_USER] * count),
)
TOOL = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "get_weather", "f" * 65])},
    optional={"parameters": SCHEMA | DEEP.map(lambda deep: {"x": deep}), "description": TEXT, "strict": st.booleans()},
).map(lambda function: {"type": "function", "function": function})
_TOOLS = {
    "tools": st.lists(TOOL, min_size=1, max_size=3),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": st.booleans(),
}


def _body(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that are mostly valid, and then one member replaced, added or left out in a third of them."""
    valid = st.fixed_dictionaries(required, optional=optional)
    names = st.sampled_from([*required, *optional, "nonsense"])
    replaced = st.tuples(valid, names, JSON).map(lambda parts: {**parts[0], parts[1]: parts[2]})
    shortened = st.tuples(valid, names).map(lambda parts: {k: v for k, v in parts[0].items() if k != parts[1]})
    return st.one_of(valid, valid, replaced, shortened)


def _large(required: dict[str, Any], length: str, optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Replies that would be small, near the limit or far above it, of texts that end at once."""
    ends = {"temperature": st.just(0), "logit_bias": st.just({str(END): 100})}
    size = {"n": st.sampled_from([1, 2, 8, 40, 70, 81, 129]), length: st.sampled_from([1, 100, 2000, 4000, 8000])}
    return st.fixed_dictionaries({**required, **ends, **size}, optional=optional)


LENGTH = st.integers(1, 4)
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)
ODD_IDS = st.sampled_from(
    [[VOCABULARY], [2**63], [10**400], [[1], [VOCABULARY]], [0] * 9000, [[1] * 900] * 80, [1] * 300_000]
)
_LIKELIEST = {"logprobs": st.just(True), "top_logprobs": st.integers(0, 20)}
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "": _body(
        {"prompt": TEXT, "max_new_tokens": LENGTH | st.sampled_from(BIG)}, {**_SAMPLING, "stream": st.booleans()}
    ),
    "/1.0/v1/completions": st.one_of(
        _body(
            {"prompt": TEXT | IDS | st.lists(TEXT, min_size=1, max_size=2) | ODD_IDS, "max_tokens": LENGTH},
            {**_SAMPLING, **_V1, "logprobs": st.integers(0, 20), "echo": st.booleans()},
        ),
        _large(
            {"prompt": st.just("One,") | st.integers(1, 60).map(lambda count: [46_778] * count)}, "max_tokens",
            {"logprobs": st.integers(0, 20), "echo": st.just(True), "stream": st.just(False)},
        ),
    ),
    "/1.0/v1/chat/completions": st.one_of(
        _body({"messages": MESSAGES, "max_tokens": LENGTH}, {**_SAMPLING, **_V1}),
        _body({"messages": MESSAGES, "max_tokens": LENGTH, **_LIKELIEST}, _TOOLS),
        _body({"messages": MESSAGES, "max_tokens": LENGTH, **_TOOLS}, {"n": st.just(2), "stream": st.booleans()}),
        _large({"messages": st.just([_USER]), **_LIKELIEST}, "max_completion_tokens", {"tools": _TOOLS["tools"]}),
        st.fixed_dictionaries(
            {"messages": st.just([_USER]), "max_tokens": LENGTH, "stream": st.just(True)},
            optional={"stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()})},
        ),
    ),
    "/1.0/v1/tokenize": _body({"prompt": TEXT}, {"add_special_tokens": st.booleans()})
    | _body({"messages": MESSAGES}, {"add_generation_prompt": st.booleans()})
    | JSON,
    "/1.0/v1/detokenize": _body({"tokens": st.lists(st.integers(-1, 50_000), max_size=6) | ODD_IDS}, {}) | JSON,
}  # fmt: skip

TYPES = [
    "application/json", "application/json; charset=utf-8", "application/vnd.api+json", "text/plain", "text/html",
    "application/octet-stream", "", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
]  # fmt: skip
BYTES = st.binary(max_size=40) | st.sampled_from(
    [
        b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"prompt":' * 50_000, b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"prompt": "a", "top_k": ' + b"9" * 10_000 + b"}", b'{"prompt": "a", "top_k": 1' + b"0" * 400 + b"}",
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}', b"NaN", b"-Infinity",
        b'{"prompt": "a", "temperature": 1e400}', b'{"prompt": "a", "temperature": -1e-400}', b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud83d"}', b'{"\\ud83d": 1}', b"\xef\xbb\xbf{}", b'{"prompt": "a"' + b" " * 500_000 + b"}",
        b'{"prompt": "a", "prompt": [[[1]]]}', b"\x00" * 1000, b'"' * 1001, b"{" + b'"a":1,' * 60_000 + b'"b":1}',
        b'{"messages": [' + b'{"role":"user","content":"a"},' * 30_000 + b"1]}",
        b'{"prompt": [' + b"1," * 400_000 + b"1]}",
        b'{"tokens": [' + b"[]," * 300_000 + b"1]}", b'{"prompt": "' + b"\\u0000" * 150_000 + b'"}', b"7" * 1_000_000,
    ]
)  # fmt: skip
