"""Schemas of strangers, and a tokenizer with a token for each byte to compile them for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WIDTH = 257
Schema = dict[str, Any]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and 256, an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def chain(length: int, wrap: Callable[[Schema], Schema]) -> Schema:
    """Definitions, each of which wraps a reference to the next one."""
    links = {f"a{at}": wrap({"$ref": f"#/$defs/a{at + 1}"}) for at in range(length)}
    return {"$defs": {**links, f"a{length}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    """A schema within a schema within a schema."""
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


WRAPS: dict[str, Callable[[Any], Any]] = {
    "items": lambda inner: {"type": "array", "items": inner},
    "prefixItems": lambda inner: {"type": "array", "prefixItems": [inner]},
    "properties": lambda inner: {"type": "object", "properties": {"a": inner}, "additionalProperties": False},
    "additionalProperties": lambda inner: {"type": "object", "additionalProperties": inner},
    "patternProperties": lambda inner: {"type": "object", "patternProperties": {"^a": inner}},
    "allOf": lambda inner: {"allOf": [inner, {"title": "x"}]},
    "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "oneOf": lambda inner: {"oneOf": [inner]},
    "not": lambda inner: {"not": inner},
    "if": lambda inner: {"if": inner, "then": inner},
    "const": lambda inner: {"const": [inner]},
}


def text(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


_ALL = {"allOf": [text(f".*a{at}.*") for at in range(16)]}
# Compiling them takes minutes, though nothing about them is long.
ENDLESS: dict[str, Schema] = {
    "patterns that all hold": _ALL,
    "of alternatives": {"allOf": [text(f"(x|y)*a{at}(x|y)*") for at in range(20)]},
    "in a property": {"type": "object", "properties": {"a": {"type": "array", "items": _ALL}}},
    "by reference": {
        "$defs": {f"a{at}": text(f".*b{at}.*") for at in range(18)},
        "allOf": [{"$ref": f"#/$defs/a{at}"} for at in range(18)],
    },
    "with lengths": {"allOf": [*_ALL["allOf"], {"type": "string", "minLength": 3, "maxLength": 90}]},
}
_RANGE = {"type": "integer", "multipleOf": 9999, "minimum": 123456789, "maximum": 987654321012345}


def _products(factors: int, ways: int) -> Schema:
    return {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{at}_{way}": {}}} for way in range(ways)]}
            for at in range(factors)
        ]
    }


# Compiling them is quick, and a text of them does not come far; or they grow when they are compiled.
TOO_COMPLEX: dict[str, Schema] = {
    "a range of multiples": _RANGE,
    "in a property": {"type": "object", "properties": {"a": _RANGE}, "required": ["a"], "additionalProperties": False},
    "in an array": {"type": "array", "minItems": 1, "items": _RANGE},
    "by reference": {"$defs": {"a": _RANGE}, "$ref": "#/$defs/a"},
    "another range": {"type": "integer", "multipleOf": 9967, "minimum": -(10**12) + 7, "maximum": 10**13 + 3},
    "products of alternatives": _products(5, 5),
    "more factors": _products(12, 2),
    "more ways": _products(3, 30),
}


def closed(**members: Any) -> Schema:
    return {"type": "object", "additionalProperties": False, **members}


_SCORE = {"score": {"type": "integer"}}
# A text of them comes to a place where nothing may follow: a further member's name must be and must not be declared.
DEAD_ENDS: dict[str, Schema] = {
    "declared only": closed(properties=_SCORE, required=["score"], patternProperties={"^score$": {"type": "integer"}}),
    "declared only, optional": closed(properties=_SCORE, patternProperties={"^score$": {"type": "integer"}}),
    "two of them": closed(
        properties={"a": {"type": "null"}, "b": {"type": "null"}}, patternProperties={"^(a|b)$": {"type": "null"}}
    ),
    "within": closed(
        properties={"x": closed(properties=_SCORE, required=["score"], patternProperties={"^score$": {}})},
        required=["x"],
    ),
    "in an array": {
        "type": "array",
        "minItems": 1,
        "items": closed(properties=_SCORE, required=["score"], patternProperties={"^score$": {}}),
    },
}
# As clients send them, and a little more: they must work.
GOOD: dict[str, Schema] = {
    "anything": {},
    "object": {"type": "object"},
    "person": closed(
        properties={
            "name": {"type": "string", "maxLength": 50},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 10},
            "when": {"type": "string", "format": "date-time"},
            "kind": {"enum": ["a", "b"]},
            "price": {"type": "number", "multipleOf": 0.01, "minimum": 0},
            "phone": text(r"^\+?[0-9 ()-]{5,20}$"),
        },
        required=["name", "age"],
    ),
    "tree": {
        "$defs": {"node": closed(properties={"name": {"type": "string"}, "children": {"type": "array", "items":
        {"$ref": "#/$defs/node"}}}, required=["name"])},
        "$ref": "#/$defs/node",
    },
    "models": chain(40, lambda inner: {"type": "object", "properties": {"x": {"type": "string"}, "y": inner}}),
    "union": {"anyOf": [{"type": "object", "properties": {"kind": {"const": kind}, "value": {"type": "number"}},
        "required": ["kind", "value"]} for kind in "abcdefgh"]},
    "optional": closed(properties={f"p{at}": {"anyOf": [{"type": "string"}, {"type": "null"}]} for at in range(100)}),
    "map": {"type": "object", "patternProperties": {"^[a-z]+$": {"type": "number"}}, "additionalProperties": False},
    "long": {"type": "array", "minItems": 10**9},
    "longer": {"type": "string", "maxLength": 10**9},
    "repeated": text("^((a{1,1000}){1,1000}){1,1000}$"),
    "self": {"type": "array", "items": {"$ref": "#"}},
    "address": text(r"^[\w.+-]+@[\w-]+\.[\w.-]+$"),
    "multiples": {"type": "integer", "multipleOf": 9999},
    "hundreds": {"type": "integer", "multipleOf": 100, "minimum": 0, "maximum": 10**6},
    "cents": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 999999.99},
    "words": text(r"^(\w+\s){5,50}\w+$"),
    "base64": text("^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"),
    "a name": {"type": "string", "pattern": "^[a-zA-Z0-9_]+$", "minLength": 3, "maxLength": 30},
    "further names": closed(
        properties={"id": {"type": "integer"}}, patternProperties={"^x-": {"type": "string"}}, required=["id"]
    ),
    "both": {"allOf": [{"type": "object", "properties": {key: {"type": "string"}}, "required": [key]} for key in "ab"]},
}  # fmt: skip
