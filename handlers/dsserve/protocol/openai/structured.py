"""`response_format` and demanded calls to grammars. Matching is `sampling.grammar`'s, bounds are `schema_bounds`'."""

from __future__ import annotations

import json
import time
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.protocol import refusals
from dsserve.protocol.openai.schema import FunctionTool, ResponseFormat, Tool
from dsserve.protocol.schema_bounds import check_schemas
from dsserve.sampling.grammar import GrammarBusyError, GrammarCompiler, GrammarError
from dsserve.sampling.matcher import TOO_COMPLEX

# Between JSON's tokens; without a limit small models write blank lines for ever.
_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,8}"}}
# Which of several tools has the schema that cannot be used is found out for so long; streams wait.
_ASKING_S = 2.0


def response_grammar(wanted: ResponseFormat | None, compiler: GrammarCompiler) -> str | None:
    """The grammar of a `response_format`; None where any text will do.

    Raises:
        RequestError: 400, a schema that cannot be compiled; 503, a machine too busy to compile it.
    """
    if wanted is None or wanted.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    check_schemas({"response_format": schema})
    return _checked(_schema_grammar(schema), "response_format", compiler)


def check_tools(tools: list[Tool]) -> None:
    """Checks the parameters of all tools, whether a call is demanded or not: templates render them, too.

    Raises:
        RequestError: 400; names the member.
    """
    check_schemas({_parameters_of(index): tool.function.parameters for index, tool in enumerate(tools)})


def call_grammar(tools: list[Tool], names: list[str], compiler: GrammarCompiler, opening: str, closing: str) -> str:
    """The grammar of one call of one of `names` among a request's `tools`, which were checked.

    The model writes the call between `opening` and `closing`.

    Raises:
        RequestError: 400, parameters that are no usable schema; 503, a machine too busy to compile them.
    """
    demanded = {index: tool.function for index, tool in enumerate(tools) if tool.function.name in names}
    calls = {index: _call_schema(index, function) for index, function in demanded.items()}
    is_one = len(calls) == 1
    schema = (next(iter(calls.values())) if is_one else {"anyOf": list(calls.values())}) | _OPTIONS
    lark = f"start: {json.dumps(opening)} call {json.dumps(closing)}\ncall: %json {json.dumps(schema)}"
    try:
        return _checked(lark_grammar(lark), _parameters_of(next(iter(calls))) if is_one else "tools", compiler)
    except RequestError as error:
        # Whose fault it is; of what costs much, together or alone, it is not asked.
        if not is_one and error.status == 400 and TOO_COMPLEX not in error.message:
            until = time.monotonic() + _ASKING_S
            for index, call in calls.items():
                if time.monotonic() > until:
                    break
                _checked(_schema_grammar(call), _parameters_of(index), compiler)
        raise


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's Lark, serialized."""
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


def _parameters_of(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _call_schema(index: int, function: FunctionTool) -> dict[str, Any]:
    # With an `$id` of their own, the parameters' references mean what they mean alone: `#/$defs/Place`.
    arguments = {"$id": f"tool:{index}"} | (function.parameters or {"type": "object"})
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _schema_grammar(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema | _OPTIONS, ensure_ascii=False)))


def _checked(grammar: str, param: str, compiler: GrammarCompiler) -> str:
    try:
        compiler.check(grammar)
    except GrammarError as error:
        raise RequestError(f"{param}: the schema cannot be used: {error}", param=param) from None
    except GrammarBusyError:
        raise refusals.too_busy_to_compile(param) from None
    return grammar
