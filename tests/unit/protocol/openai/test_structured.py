"""Schemas of strangers: those that cannot be used, or would hold the server, are refused; the others match in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dsserve.core.errors import RequestError
from dsserve.protocol.openai.schema import ResponseFormat, Tool
from dsserve.protocol.openai.structured import _schema_grammar, call_grammar, check_tools, response_grammar
from dsserve.sampling.grammar import GrammarCompiler, GrammarError
from dsserve.sampling.matcher import make_matcher
from tests.support.schemas import (
    DEAD_ENDS,
    GOOD,
    TOO_COMPLEX,
    WIDTH,
    WRAPS,
    byte_tokenizer,
    chain,
    closed,
    nested,
    text,
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(byte_tokenizer(), WIDTH, frozenset({256}))
    made.check(_schema_grammar({}))
    yield made
    made.close()


def grammar_of(schema: Any, compiler: GrammarCompiler) -> str:
    wanted = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    found = response_grammar(wanted, compiler)
    assert found is not None
    return found


def first_mask(schema: Any, compiler: GrammarCompiler) -> np.ndarray:
    return compiler.start(grammar_of(schema, compiler)).allowed(WIDTH)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#"}, "no text can match it"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "no text can match it"),
        ({"$ref": "http://127.0.0.1:1/x"}, "not"),
        ({"$ref": "file:///etc/passwd"}, "not"),
        (chain(1400, WRAPS["items"]), "at most"),
        (chain(200, WRAPS["items"]), "at most 256"),
        (nested(2000, WRAPS["items"]), "nested too deeply"),
        ({"type": "integer", "multipleOf": 123456789}, "may be 10000"),
        ({"type": "number", "minimum": -1e300, "maximum": 1e300}, "range"),
        ({"type": "strin"}, "Invalid type"),
        ({"properties": {"a": 5}}, "must be"),
        (text("(?=a)b"), "look-around"),
        (text("["), "unclosed"),
        (TOO_COMPLEX["a range of multiples"], "too complex"),
        (TOO_COMPLEX["more factors"], "too large"),
        *((schema, "comes to a place where nothing may follow") for schema in DEAD_ENDS.values()),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_at_once(compiler: GrammarCompiler, schema: Any, words: str) -> None:
    for _ in range(2):  # the second time it is known
        started = time.monotonic()
        with pytest.raises(RequestError) as caught:
            grammar_of(schema, compiler)
        assert time.monotonic() - started < 5
        assert caught.value.status == 400 and caught.value.param == "response_format"
        assert words in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize("schema", GOOD.values(), ids=GOOD)
def test_a_schema_that_clients_send_or_that_looks_large_is_served_in_time(
    compiler: GrammarCompiler, schema: Any
) -> None:
    started = time.monotonic()
    assert first_mask(schema, compiler).any()
    assert time.monotonic() - started < 5


PLACE = {"$defs": {"Place": {"type": "object", "required": ["town"], "properties": {"town": {"const": "Rome"}}}}}


def tool(name: str, parameters: dict[str, Any]) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def test_references_in_parameters_mean_what_they_mean_alone(compiler: GrammarCompiler) -> None:
    tools = [tool(name, PLACE | {"properties": {"at": {"$ref": "#/$defs/Place"}}, "required": ["at"]}) for name in "fg"]
    for names in (["f"], ["f", "g"]):
        grammar = compiler.start(call_grammar(tools, names, compiler, "<", ">"))
        for byte in b'<{"name":"f","arguments":{"at":{"town":':
            grammar.accept(token_of(compiler, byte))
        assert grammar.allowed(WIDTH)[token_of(compiler, ord('"'))]


def token_of(compiler: GrammarCompiler, byte: int) -> int:
    return int(compiler._tokenizer(chr(byte))["input_ids"][0])


@pytest.mark.parametrize("bad", [{"type": "strin"}, {"$ref": "#/$defs/none"}, next(iter(DEAD_ENDS.values()))])
def test_an_error_names_the_tool_whose_schema_it_is(compiler: GrammarCompiler, bad: dict[str, Any]) -> None:
    tools = [tool("f", {}), tool("g", PLACE), tool("h", closed(properties={"a": bad}, required=["a"])), tool("i", {})]
    for names in (["h"], ["f", "g", "h", "i"]):
        with pytest.raises(RequestError) as caught:
            call_grammar(tools, names, compiler, "<", ">")
        assert caught.value.param == "tools[2].function.parameters"
    assert call_grammar(tools, ["f", "g", "i"], compiler, "<", ">")


@pytest.mark.parametrize(
    "parameters",
    [nested(400, WRAPS["items"]), {"properties": {"a": {"maxLength": 10**30}}}],
    ids=["depth", "length"],
)
def test_parameters_that_nobody_compiles_are_bounded_too(parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        check_tools([tool("f", {}), tool("g", parameters)])
    assert caught.value.status == 400 and caught.value.param == "tools[1].function.parameters"


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

    def count(tokens: Any, grammar: str) -> Any:
        compiled.append(grammar)
        return make_matcher(tokens, grammar)

    monkeypatch.setattr("dsserve.sampling.grammar.make_matcher", count)
    grammars = [grammar_of({"const": number}, compiler) for number in range(20)]
    for grammar in grammars[-5:]:
        for _ in range(20):
            compiler.check(grammar)
            compiler.start(grammar)
    assert compiled == grammars and len(compiler._compiled) == 16


def test_what_is_kept_is_bounded_in_bytes_and_the_last_used_stays(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler._compiled.clear()
    first, *others = [grammar_of({"const": f"kept {number}"}, compiler) for number in range(4)]
    compiler.start(first)
    size = max(kept.nbytes for kept in compiler._compiled.values())
    monkeypatch.setattr("dsserve.sampling.grammar._KEPT_BYTES", 2.5 * size)
    last = grammar_of({"const": "the last one"}, compiler)
    assert first in compiler._compiled and last in compiler._compiled and others[-1] not in compiler._compiled


def test_refusals_are_kept_and_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsserve.sampling.grammar._KEPT_REFUSALS", 3)
    compiler._refused.clear()
    for number in range(6):
        with pytest.raises(RequestError):
            grammar_of({"type": f"no{number}"}, compiler)
    assert len(compiler._refused) == 3
    monkeypatch.setattr("dsserve.sampling.grammar_process.GrammarProcess.judge", None)  # it is not asked again
    with pytest.raises(RequestError, match="Invalid type: no5"):
        grammar_of({"type": "no5"}, compiler)


def digits(compiler: GrammarCompiler, text: str) -> list[int]:
    return [token_of(compiler, byte) for byte in text.encode()]


def test_a_text_that_fails_takes_neither_its_neighbours_nor_those_to_come_along(compiler: GrammarCompiler) -> None:
    """The lexer is shared: what one text makes it give up holds for all copies."""
    grammar = _schema_grammar(TOO_COMPLEX["a range of multiples"])
    failing, neighbour = compiler.start(grammar), compiler.start(grammar)
    for row, text_so_far in ((failing, "12"), (neighbour, "2")):
        for token in digits(compiler, text_so_far):
            assert row.allowed(WIDTH)[token]
            row.accept(token)
    with pytest.raises(GrammarError, match="too complex"):
        failing.allowed(WIDTH)
    assert not failing.is_complete
    assert neighbour.allowed(WIDTH).sum() == 10
    assert compiler.start(grammar).allowed(WIDTH).sum() == 9  # no leading zero


def test_a_text_at_a_dead_end_fails_with_a_reason_that_holds_no_text(compiler: GrammarCompiler) -> None:
    grammar = compiler.start(_schema_grammar(DEAD_ENDS["declared only"]))
    for token in digits(compiler, '{"score":7,        '):
        assert grammar.allowed(WIDTH)[token]
        grammar.accept(token)
    with pytest.raises(GrammarError) as caught:
        grammar.allowed(WIDTH)
    assert str(caught.value) == "a text that matches it comes to a place where nothing may follow"
    assert not grammar.is_complete
