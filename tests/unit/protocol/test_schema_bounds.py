"""Schemas beyond a bound are refused before anything reads them, and the error names the member and the bound."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dsserve.core.errors import RequestError
from dsserve.protocol.schema_bounds import LIMITS, REACH, Bound, check_schemas
from tests.support.schemas import GOOD, WRAPS, chain, nested, text

MEMBER = "tools[3].function.parameters"


def refusal(schema: Any) -> str:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        check_schemas({MEMBER: schema})
    assert time.monotonic() - started < 2
    assert caught.value.status == 400 and caught.value.param == MEMBER
    assert caught.value.message.startswith(f"{MEMBER}: ")
    return caught.value.message


@pytest.mark.parametrize("schema", GOOD.values(), ids=GOOD)
def test_what_clients_send_is_within_the_bounds(schema: Any) -> None:
    check_schemas({MEMBER: schema})


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "if"])
@pytest.mark.parametrize("depth", [70, 10_000])
def test_nesting_is_bounded_whatever_nests(wrap: str, depth: int) -> None:
    assert "is nested too deeply: at most 64 levels" in refusal(nested(depth, WRAPS[wrap]))
    check_schemas({MEMBER: nested(20, WRAPS[wrap])})


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name not in ("if", "not", "const")])
def test_chains_of_references_are_bounded_whatever_they_lead_through(wrap: str) -> None:
    assert f"at most {REACH.most} are taken" in refusal(chain(REACH.most, WRAPS[wrap]))
    assert "at most" in refusal(chain(1400, WRAPS[wrap]))
    check_schemas({MEMBER: chain(40, WRAPS[wrap])})


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {f"a{at}": {"$anchor": f"x{at}", "items": {"$ref": f"#x{at + 1}"}} for at in range(300)}},
        {"$defs": {f"a{at}": {"$id": f"x{at}", "items": {"$ref": f"x{at + 1}"}} for at in range(300)}},
        {"$defs": {f"a{at}": {"$id": f"x{at}", "items": {"$ref": f"x{at + 1}#"}} for at in range(300)}},
        {f"~1{at}%": {"items": {"$ref": f"#/~0~01{at + 1}%25".replace("~0~01", "~01")}} for at in range(300)},
        {"prefixItems": [{"items": {"$ref": f"#/prefixItems/{at + 1}"}} for at in range(300)]},
        {"definitions": {f"é{at}": {"items": {"$ref": f"#/definitions/%C3%A9{at + 1}"}} for at in range(300)}},
        {"$defs": {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(300)}},
        {"properties": {f"a{at}": nested(5, WRAPS["items"]) | {"not": {"$ref": f"#/properties/a{at + 1}"}}
                        for at in range(300)}},
    ],
)  # fmt: skip
def test_references_are_followed_however_they_are_spelled(schema: Any) -> None:
    assert f"at most {REACH.most} are taken" in refusal(schema)


def test_many_references_that_lead_nowhere_far_are_taken() -> None:
    models = {f"M{at}": {"properties": {"a": {"$ref": f"#/$defs/M{at % 7}"}, "b": {"$ref": "#"}}} for at in range(300)}
    check_schemas({MEMBER: {"$defs": models, "anyOf": [{"$ref": f"#/$defs/M{at}"} for at in range(300)]}})


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "multipleOf": 123456789}, "may be 10000"),
        ({"type": "number", "multipleOf": 123.456789}, "may be 10000"),
        ({"type": "number", "multipleOf": 1e308}, "may be 10000"),
        ({"multipleOf": -123456789}, "may be 10000"),
        ({"allOf": [{"type": "integer", "multipleOf": divisor} for divisor in (7, 11, 13, 17)]}, "may be 10000"),
        ({"maxLength": 10**30}, "not 0 to 2147483647"),
        ({"maxLength": 1e30}, "not 0 to 2147483647"),
        ({"items": {"minItems": 2**31}}, "not 0 to 2147483647"),
        ({"minProperties": -1}, "not 0 to 2147483647"),
        (text("a" * 4097), "4097 characters of a `pattern`, at most 4096"),
        ({"patternProperties": {"b" * 4097: {}}}, "at most 4096"),
        ({"properties": {f"p{at}": text(f"a{at}") for at in range(301)}}, "301 `pattern`s of a schema, at most 300"),
        ({"patternProperties": {f"^p{at}$": {} for at in range(33)}}, "33 `patternProperties`"),
        ({"anyOf": [{"patternProperties": {f"^{at}$": {}}} for at in range(301)]}, "301 `pattern`s"),
        ({"properties": {f"p{at}": {} for at in range(1001)}}, "in all its objects, at most 1000"),
        ({"anyOf": [{"properties": {f"p{at}": {} for at in range(300)}} for _ in range(4)]}, "at most 1000"),
        ({"enum": list(range(5001))}, "5001 values of all `enum`s"),
        ({"anyOf": [{"enum": list(range(at, at + 300))} for at in range(17)]}, "5100 values of all `enum`s"),
        ({"enum": ["x" * 66_000]}, "at most 65536"),
        ({"description": "x" * 65_536}, "at most 65536"),
        ({"required": ["abc"] * 11_000}, "at most 65536"),
        ({"default": [[]] * 25_000}, "at most"),
    ],
)  # fmt: skip
def test_what_is_beyond_a_bound_is_refused(schema: Any, words: str) -> None:
    assert words in refusal(schema)
    assert words in refusal({"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, schema]}}})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {name: {"type": "string"} for name in ("maxLength", "multipleOf", "pattern", "enum", "$ref")}},
        {"multipleOf": 5000, "items": {"multipleOf": 5000}},
        {"multipleOf": 1e-9},
        {"minimum": -(2**63), "maximum": 2**64 - 1},
        {"maxLength": 2**31 - 1, "description": "né €"},
        {"$ref": "#"},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        {"$ref": "#/no/such/99999999999999999999"},
        {"prefixItems": [], "$ref": "#/prefixItems/99999999999999999999999"},
        {"$ref": 5, "pattern": 5, "enum": 5, "properties": 5, "multipleOf": "5", "maxLength": None, "$id": []},
    ],
)
def test_what_only_looks_like_it_is_left_to_the_compiler(schema: Any) -> None:
    check_schemas({MEMBER: schema})


def test_all_schemas_of_a_request_are_bounded_together() -> None:
    schema = {"description": "x" * 60_000}
    check_schemas({f"tools[{at}].function.parameters": schema for at in range(4)})
    with pytest.raises(RequestError) as caught:
        check_schemas({f"tools[{at}].function.parameters": schema for at in range(5)})
    assert caught.value.param == "tools[4].function.parameters" and "at most 262144" in caught.value.message


def test_the_table_has_each_bound() -> None:
    assert len(LIMITS) == 13 and all(isinstance(bound, Bound) and bound.what and bound.most > 0 for bound in LIMITS)
    assert {bound.status for bound in LIMITS} == {400}
