"""Any JSON value that a client may send is within bounds before anybody works on it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsserve.core.errors import RequestError
from dsserve.protocol.bounds import DEPTH, LARGEST_INT, SMALLEST_INT
from dsserve.protocol.json_bounds import check_body, check_json


def nested(levels: int, dicts: bool = False) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if dicts else [value]
    return value


def refusal(body: dict[str, Any], **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check_body(body, **options)
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # it can be sent
    return caught.value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (nested(DEPTH.most + 1), "nested too deeply"),
        (nested(DEPTH.most + 1, dicts=True), "nested too deeply"),
        (nested(100_000), "nested too deeply"),
        ({"a": [{"b": nested(400)}]}, "nested too deeply"),
        ([LARGEST_INT + 1], "64 bits"),
        ({"a": SMALLEST_INT - 1}, "64 bits"),
        ({"multipleOf": 10**400}, "64 bits"),
        ([1, "a", [-(10**4000)]], "64 bits"),
        ([float("nan")], "no 64-bit float"),
        ({"a": [float("inf"), "x"]}, "no 64-bit float"),
        (json.loads("[1e400]"), "no 64-bit float"),
        (float("-inf"), "no 64-bit float"),
        ({"description": "\ud83d"}, "lone surrogate"),
        ({"\udfff": 1}, "lone surrogate"),
        (["a", ["b\ud800c"]], "lone surrogate"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_is_beyond_a_bound_is_refused_by_the_name_of_its_member(value: Any, words: str) -> None:
    error = refusal({"prompt": "a", "tools": value})
    assert error.status == 400 and str(error.param).startswith("tools")
    assert words in error.message and error.message.startswith(f"{error.param} ")


def tool(parameters: Any) -> list[Any]:
    return [{"type": "function"}, {"type": "function", "function": {"name": "f", "parameters": parameters}}]


PARAMETERS = "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("tools", "place"),
    [
        ("\ud800", "tools"),
        ([1, 2, 2**64, 3], "tools[2]"),
        (tool({"description": "\ud83d"}), f"{PARAMETERS}.description"),
        (tool({"properties": {"a\udc00": {}}}), f"{PARAMETERS}.properties"),
        (tool({"a": [0.5, float("nan")]}), f"{PARAMETERS}.a[1]"),
        (tool({"a b": {"c": 10**400}}), PARAMETERS),  # a name that is not plain ends the place
        (tool({"é": "\ud800"}), PARAMETERS),
        (tool({"$defs": {"x-y": 10**400}}), f"{PARAMETERS}.$defs.x-y"),
        (tool({"a" * 100: 10**400}), PARAMETERS),  # a long one, too
        (tool({"items": nested(200, dicts=True)}), f"{PARAMETERS}.items" + ".a" * 15),
        (tool(nested(200)), PARAMETERS + "[0]" * 12),
        ([{"a": 7}, {"a": 7, "b": -(10**30)}], "tools[1].b"),
    ],
)
def test_an_error_names_the_place_within_the_member(tools: Any, place: str) -> None:
    error = refusal({"prompt": "a", "tools": tools})
    assert error.param == place and error.message.startswith(f"{place} ") and len(place) <= 64


def test_the_place_of_something_in_a_wide_body_is_found_at_once() -> None:
    wide = [{"a": [number, str(number)]} for number in range(40_000)]
    wide[-1]["a"].append(float("inf"))
    started = time.process_time()
    assert refusal({"tools": wide}).param == "tools[39999].a[2]"
    assert time.process_time() - started < 2


def test_what_is_at_a_bound_is_taken() -> None:
    for value in (
        nested(DEPTH.most), nested(DEPTH.most, True), [LARGEST_INT, SMALLEST_INT], [1e308, -1e308, 5e-324],
        "日本\U0001f642", {"é": {}}, [True, None],
    ):  # fmt: skip
        check_body({"tools": value})


def test_a_members_own_number_is_left_to_its_type() -> None:
    check_body({"top_k": 10**400})


def test_a_name_that_cannot_be_sent_back_is_refused() -> None:
    error = refusal({"\ud800": 1})
    assert error.param is None and "a member's name is not valid Unicode" in error.message


def test_all_values_and_members_count() -> None:
    body = {"prompt": [[1, 2], [3]], "tools": [{"a": 1, "b": {"c": None}}]}
    # 1 + 2 lists + 3 numbers and 1 + 1 dict + (2 names, 2 values) + (1 name, 1 value), with one for each member
    check_body(body, most_values=16)
    for most in (2, 7, 8, 11, 13):
        assert "holds more than" in refusal(body, most_values=most).message


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=20))
def test_what_passes_can_be_encoded(value: Any) -> None:
    try:
        count = check_json(value, "tools")
    except RequestError:
        return
    assert count >= 1
    assert "Infinity" not in json.dumps(value, ensure_ascii=False).encode().decode()
