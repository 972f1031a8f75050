"""Hypothesis strategies for bodies of the endpoints: valid ones, and the same with one thing wrong or strange."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TEXT = st.text(max_size=12) | st.sampled_from(["Hello", "One, two,", "", "\ud800", "日本", "\x00", "a\n[METRICS]x"])
NUMBER = st.integers(-3, 60) | st.floats(-3, 3) | st.sampled_from([2**63, -(2**63), 1e308, 0.0, 49_151, 49_152])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)

SCHEMA = st.recursive(
    st.sampled_from(
        [{}, {"type": "integer"}, {"enum": ["a", 1]}, {"const": "\U0001f642"}, {"$ref": "#"}, {"type": "nonsense"},
         {"type": "string", "pattern": "^(a|b){2,9}$"}, {"type": "string", "format": "date", "maxLength": 3}]
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
    "top_k": st.integers(-1, 60_000),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.01, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 49_151).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 49_151), max_size=3),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 3),
    "timeout": st.floats(60, 600),
}
_V1 = {
    "model": st.sampled_from(["smollm2", "other"]),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | FORMAT,
    "user": TEXT,
}
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT | st.none()},
    optional={"name": TEXT},
)


def _body(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that are mostly valid, and then one member replaced, added or left out in a third of them."""
    valid = st.fixed_dictionaries(required, optional=optional)
    names = st.sampled_from([*required, *optional, "nonsense"])
    replaced = st.tuples(valid, names, JSON).map(lambda parts: {**parts[0], parts[1]: parts[2]})
    shortened = st.tuples(valid, names).map(lambda parts: {k: v for k, v in parts[0].items() if k != parts[1]})
    return st.one_of(valid, valid, replaced, shortened)


LENGTH = st.integers(1, 4)
IDS = st.lists(st.integers(0, 49_151), min_size=1, max_size=5)
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "": _body({"prompt": TEXT, "max_new_tokens": LENGTH}, {**_SAMPLING, "stream": st.booleans()}),
    "/1.0/v1/completions": _body(
        {"prompt": TEXT | IDS | st.lists(TEXT, min_size=1, max_size=2), "max_tokens": LENGTH},
        {**_SAMPLING, **_V1, "logprobs": st.integers(0, 20), "echo": st.booleans()},
    ),
    "/1.0/v1/chat/completions": _body(
        {"messages": st.lists(_MESSAGE, min_size=1, max_size=3), "max_tokens": LENGTH},
        {**_SAMPLING, **_V1, "logprobs": st.booleans(), "top_logprobs": st.integers(0, 20)},
    ),
    "/1.0/v1/tokenize": _body({"prompt": TEXT}, {"add_special_tokens": st.booleans()}) | JSON,
    "/1.0/v1/detokenize": _body({"tokens": st.lists(st.integers(-1, 50_000), max_size=6)}, {}) | JSON,
}
