"""`response_format` and demanded tool calls to grammars. Matching is `generation.grammar`'s."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from dsserve.errors import RequestError
from dsserve.generation.grammar import GrammarCompiler, GrammarError
from dsserve.protocol.openai_schema import ResponseFormat, Tool

MAX_SCHEMA_CHARACTERS = 65_536
# An automaton that divides has as many states as the product of what it divides by. With 10,000 llguidance makes it in
# 0.1 s; it has limits for everything else, and none for this: 123456789 took minutes, which would end the worker.
MAX_DIVISORS = 10_000
# Between JSON's tokens; without a limit small models write blank lines for ever.
_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,8}"}}


def response_grammar(wanted: ResponseFormat | None, compiler: GrammarCompiler) -> str | None:
    """The grammar of a `response_format`; None where any text will do.

    Raises:
        RequestError: 400, a schema that cannot be compiled.
    """
    if wanted is None or wanted.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    return _compile(schema, "response_format", compiler)


def call_grammar(tools: list[Tool], compiler: GrammarCompiler, opening: str, closing: str) -> str:
    """The grammar of one call of one of `tools`, as the model writes it between `opening` and `closing`.

    Raises:
        RequestError: 400, parameters that are no usable schema.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = (calls[0] if len(calls) == 1 else {"anyOf": calls}) | _OPTIONS
    _compile(schema, "tools", compiler)
    lark = f"start: {json.dumps(opening)} call {json.dumps(closing)}\ncall: %json {json.dumps(schema)}"
    return _checked(lark_grammar(lark), "tools", compiler)


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's Lark, serialized."""
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


def _compile(schema: dict[str, Any], param: str, compiler: GrammarCompiler) -> str:
    from llguidance import LLMatcher

    try:
        text = json.dumps(schema | _OPTIONS)
    except RecursionError:
        raise RequestError(f"{param}: the schema is nested too deeply", param=param) from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise RequestError(
            f"{param}: the schema has {len(text)} characters, at most {MAX_SCHEMA_CHARACTERS} are taken", param=param
        )
    _check_divisors(schema, param)
    return _checked(str(LLMatcher.grammar_from_json_schema(text)), param, compiler)


def _check_divisors(schema: dict[str, Any], param: str) -> None:
    """Raises RequestError (400) where the `multipleOf`s of a schema are too large together."""
    found: set[int] = set()
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            divisor = part.get("multipleOf")
            if type(divisor) is int or (isinstance(divisor, float) and math.isfinite(divisor)):
                found.add(_states(divisor))
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    if math.prod(found) > MAX_DIVISORS:
        raise RequestError(
            f"{param}: the numbers of multipleOf are too large, their product may be {MAX_DIVISORS} (without decimal "
            "point: 0.25 counts as 25): use smaller ones, or leave them out",
            param=param,
        )


def _states(divisor: float) -> int:
    """States of an automaton that divides by a decimal number: 12 for 12 and 0.12, 1000 for 1000, 1 for 0.001."""
    _, digits, exponent = Decimal(repr(divisor)).normalize().as_tuple()
    zeros = max(0, exponent) if isinstance(exponent, int) else 0
    return int("".join(map(str, digits))) * 10**zeros or 1


def _checked(grammar: str, param: str, compiler: GrammarCompiler) -> str:
    try:
        compiler.check(grammar)
    except GrammarError as error:
        raise RequestError(f"{param}: the schema cannot be used: {str(error)[:200]}", param=param) from None
    return grammar
