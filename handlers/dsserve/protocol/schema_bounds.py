"""Bounds on the JSON schemas that a request holds, looked at before anything compiles, renders or encodes them.

A compiler of schemas recurses, and its stack ends the process: it dies of 1,100 references in a chain. Its time grows
with the square of some counts. What is within these bounds and costs too much all the same is found out in a process
of its own (`sampling.grammar_process`). Nothing here recurses. What any JSON must be was checked before
(`json_bounds`). Knows no grammar (`structured`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from dsserve.core.errors import RequestError
from dsserve.protocol.bounds import Bound

# Measured with llguidance 1.9.1 and 49,152 tokens on one core of 2.1 GHz; "dies" is a signal that ends the process.
CHARACTERS = Bound("characters of a schema", 65_536)
ALL_CHARACTERS = Bound("characters of all schemas of a request", 262_144)
NODES = Bound("values within a schema", 20_000)
DEPTH = Bound("levels of arrays and objects within each other, in a schema", 64)  # refused by the compiler from 127 on
# A reference is a level, too. 2,200 levels (1,100 `items` that refer to the next one) die; 1,600 compile.
REACH = Bound("levels of a schema where its references are followed", 256)
REFERENCES = Bound("`$ref`s of a schema", 1_000)  # 2,400 in a chain take 0.06 s, where they do not die
PROPERTIES = Bound("`properties` of a schema, in all its objects", 1_000)  # 1,000: 0.17 s; 2,000: 0.7 s
NAME_PATTERNS = Bound("`patternProperties` of an object", 32)  # each is compared with each: 200 take 1.4 s, 500 minutes
ENUM_VALUES = Bound("values of all `enum`s of a schema", 5_000)  # 0.07 s
PATTERN_CHARACTERS = Bound("characters of a `pattern`", 4_096)  # 60,000 take 0.04 s
PATTERNS = Bound("`pattern`s of a schema", 300)  # 1,000 take 0.3 s
LENGTHS = Bound("`minLength`, `maxLength`, `minItems`, `maxItems`, `minProperties`, `maxProperties`", 2**31 - 1)
# An automaton that divides has as many states as the product of what it divides by. With 10,000 llguidance makes it in
# 0.05 s; it has limits for everything else, and none for this: 100,003 took 0.5 s, 123456789 minutes.
DIVISORS = Bound("product of all `multipleOf`s of a schema, without decimal points (0.25 counts as 25)", 10_000)

LIMITS: tuple[Bound, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Bound))

_LENGTHS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})


def check_schemas(schemas: dict[str, Any]) -> None:
    """Checks all schemas of a request.

    Args:
        schemas: the member that holds it -> the schema.

    Raises:
        RequestError: 400; names the member and the bound.
    """
    total = 0
    for where, schema in schemas.items():
        total += _Count(where).all_of(schema)
        if total > ALL_CHARACTERS.most:
            raise _beyond(where, ALL_CHARACTERS, total)


class _Count:
    """What one schema holds. `where` is the member that errors name."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: dict[Bound, int] = {}
        self._divisors: set[int] = set()
        self._names: dict[str, Any] = {}  # what a `$ref` may say -> the part that it means

    def all_of(self, schema: Any) -> int:
        """Checks a schema; returns about how many characters it has."""
        level, depth = [schema], 0
        while level:
            depth += 1
            below: list[Any] = []
            for part in level:
                self._count(part)
                below += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
            self._add(NODES, len(level))
            level = below
            if depth > DEPTH.most and any(isinstance(part, dict | list) for part in level):
                raise self._refusal(f"is nested too deeply: at most {DEPTH.most} levels")
        self._check_divisors()
        self._check_reach(schema)
        return self._found.get(CHARACTERS, 0)

    def _count(self, part: Any) -> None:
        if isinstance(part, dict):
            self._add(CHARACTERS, 2)
            for name, value in part.items():
                self._count_member(part, name, value)
        elif isinstance(part, list):
            self._add(CHARACTERS, 2 + len(part))
        else:
            self._count_scalar(part)

    def _count_member(self, part: dict[str, Any], name: str, value: Any) -> None:
        self._count_scalar(name)
        self._add(CHARACTERS, 2)
        if name == "properties" and isinstance(value, dict):
            self._add(PROPERTIES, len(value))
        elif name == "patternProperties" and isinstance(value, dict):
            if len(value) > NAME_PATTERNS.most:
                raise _beyond(self._where, NAME_PATTERNS, len(value))
            for pattern in value:
                self._count_pattern(pattern)
        elif name == "enum" and isinstance(value, list):
            self._add(ENUM_VALUES, len(value))
        elif name == "pattern" and isinstance(value, str):
            self._count_pattern(value)
        elif name == "$ref" and isinstance(value, str):
            self._add(REFERENCES, 1)
        elif name in ("$id", "$anchor") and isinstance(value, str):
            self._names[value.removeprefix("#")] = part
        elif name in _LENGTHS and isinstance(value, int | float) and not -1 < value <= LENGTHS.most:
            raise self._refusal(f"has a {name} that is not 0 to {LENGTHS.most}")
        elif name == "multipleOf" and isinstance(value, int | float):
            self._divisors.add(_states(value))

    def _count_scalar(self, value: Any) -> None:
        if isinstance(value, str):
            self._add(CHARACTERS, 2 + len(value))
        elif isinstance(value, int):  # bool, too
            self._add(CHARACTERS, 1 + value.bit_length() // 3)
        elif isinstance(value, float):
            self._add(CHARACTERS, len(repr(value)))
        else:
            self._add(CHARACTERS, 4)

    def _count_pattern(self, pattern: Any) -> None:
        self._add(PATTERNS, 1)
        if isinstance(pattern, str) and len(pattern) > PATTERN_CHARACTERS.most:
            raise _beyond(self._where, PATTERN_CHARACTERS, len(pattern))

    def _add(self, bound: Bound, count: int) -> None:
        found = self._found[bound] = self._found.get(bound, 0) + count
        if found > bound.most:
            raise _beyond(self._where, bound, found)

    def _check_divisors(self) -> None:
        if math.prod(self._divisors) > DIVISORS.most:
            raise self._refusal(
                f"has too large numbers of multipleOf, their product may be {DIVISORS.most} (without decimal "
                "point: 0.25 counts as 25): use smaller ones, or leave them out"
            )

    def _check_reach(self, schema: Any) -> None:
        if not self._found.get(REFERENCES):
            return
        reach = _reach(schema, self._names)
        if reach > REACH.most:
            raise self._refusal(
                f"leads through {reach} levels where its references are followed, and at most {REACH.most} are taken: "
                "write fewer, or shallower ones"
            )

    def _refusal(self, why: str) -> RequestError:
        return RequestError(f"{self._where}: the schema {why}", param=self._where)


def _beyond(where: str, bound: Bound, found: int) -> RequestError:
    message = f"{where}: at least {found} {bound.what}, at most {bound.most} are taken"
    return RequestError(message, param=where, status=bound.status)


def _states(divisor: float) -> int:
    """States of an automaton that divides by a decimal number: 12 for 12 and 0.12, 1000 for 1000, 1 for 0.001."""
    if isinstance(divisor, int):
        return abs(divisor) or 1
    _, digits, exponent = Decimal(repr(divisor)).normalize().as_tuple()
    zeros = max(0, exponent) if isinstance(exponent, int) else 0
    return int("".join(map(str, digits))) * 10**zeros or 1


def _reach(schema: Any, names: dict[str, Any]) -> int:
    """Levels of the longest way down that follows references; a way that comes back to itself ends there."""
    below: dict[int, int] = {}  # of a part, by its identity; 0 while its own ways are being looked at
    parts: list[tuple[Any, bool]] = [(schema, False)]
    while parts:
        part, seen_all = parts.pop()
        if seen_all:
            below[id(part)] = 1 + max((below[id(next_one)] for next_one in _leads_to(part, schema, names)), default=0)
        elif id(part) not in below:
            below[id(part)] = 0
            parts.append((part, True))
            parts += [(next_one, False) for next_one in _leads_to(part, schema, names)]
    return below[id(schema)]


def _leads_to(part: Any, schema: Any, names: dict[str, Any]) -> Iterator[Any]:
    inside = part.values() if isinstance(part, dict) else part
    yield from (value for value in inside if isinstance(value, dict | list))
    reference = part.get("$ref") if isinstance(part, dict) else None
    if isinstance(reference, str):
        target = _resolve(reference, schema, names)
        if isinstance(target, dict | list):
            yield target


def _resolve(reference: str, schema: Any, names: dict[str, Any]) -> Any:
    """The part that a reference means: by `$id`, by `$anchor`, by a pointer from an `$id` or the root; else None."""
    base, _, pointer = reference.partition("#")
    found = names.get(base, schema) if base else schema
    if not pointer.startswith("/"):
        return names.get(pointer) if pointer else found
    for step in unquote(pointer[1:]).split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal():
            step_index = int(step[:9])
            found = found[step_index] if step_index < len(found) else None
        else:
            found = found.get(step) if isinstance(found, dict) else None
    return found
