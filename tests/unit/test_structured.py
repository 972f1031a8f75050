"""Schemas of strangers: those that cannot be used, or would hold the server, are refused; the others match in time."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsserve.errors import RequestError
from dsserve.generation.grammar import GrammarCompiler
from dsserve.protocol.openai_schema import ResponseFormat
from dsserve.protocol.structured import response_grammar

WIDTH = 257


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """A token for each byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    return GrammarCompiler(fast, WIDTH, frozenset({256}))


def grammar_of(schema: Any, compiler: GrammarCompiler) -> str:
    wanted = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    found = response_grammar(wanted, compiler)
    assert found is not None
    return found


def first_mask(schema: Any, compiler: GrammarCompiler) -> np.ndarray:
    return compiler.start(grammar_of(schema, compiler)).allowed(WIDTH)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "multipleOf": 123456789}, "may be 10000"),
        ({"type": "integer", "multipleOf": 10**400}, "may be 10000"),
        ({"type": "number", "multipleOf": 123.456789}, "may be 10000"),
        ({"allOf": [{"type": "integer", "multipleOf": divisor} for divisor in (7, 11, 13, 17)]}, "may be 10000"),
        ({"$ref": "#"}, "no text can match it"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "no text can match it"),
        ({"$ref": "http://127.0.0.1:1/x"}, "not"),
        ({"$ref": "file:///etc/passwd"}, "not"),
        (nested(300), "recursion limit"),
        (nested(2000), "nested too deeply"),
        ({"enum": ["x" * 66_000]}, "at most 65536"),
        ({"type": "number", "minimum": -1e300, "maximum": 1e300}, "range"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_at_once(compiler: GrammarCompiler, schema: Any, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        grammar_of(schema, compiler)
    assert time.monotonic() - started < 5
    assert caught.value.status == 400 and caught.value.param == "response_format" and words in caught.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 5000},
        {"type": "number", "multipleOf": 0.01},
        {"type": "number", "multipleOf": 1e-9},
        {"properties": {"a": {"multipleOf": 60}, "b": {"multipleOf": 0.25}, "multipleOf": {"type": "string"}}},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    ],
)
def test_a_schema_that_looks_large_is_served_in_time(compiler: GrammarCompiler, schema: Any) -> None:
    started = time.monotonic()
    assert first_mask(schema, compiler).any()
    assert time.monotonic() - started < 5


def test_texts_of_one_grammar_do_not_touch_each_other(compiler: GrammarCompiler) -> None:
    grammar = grammar_of({"enum": ["ab", "cd"]}, compiler)
    first, second = compiler.start(grammar), compiler.start(grammar)
    before = second.allowed(WIDTH)
    first.accept(int(before.argmax()))
    assert not np.array_equal(first.allowed(WIDTH), before) and np.array_equal(second.allowed(WIDTH), before)
    assert np.array_equal(compiler.start(grammar).allowed(WIDTH), before)


def test_a_grammar_is_compiled_once_for_all_its_texts(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    class Counting:
        validate_grammar = LLMatcher.validate_grammar

        def __new__(cls, tokenizer: Any, grammar: str, log_level: int) -> Any:
            compiled.append(grammar)
            return LLMatcher(tokenizer, grammar, log_level=log_level)

    grammars = [LLMatcher.grammar_from_json_schema(json.dumps({"const": number})) for number in range(12)]
    monkeypatch.setattr("llguidance.LLMatcher", Counting)
    for grammar in grammars:
        compiler.check(grammar)
        for _ in range(20):
            compiler.start(grammar)
    assert compiled == grammars and len(compiler._compiled) <= 8
