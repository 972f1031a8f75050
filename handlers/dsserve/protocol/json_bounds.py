"""Bounds of any JSON value that a client sends: how deep, how many, which numbers, which strings.

Whoever hands a value on, to a template, a grammar or an encoder, may rely on them: nobody checks them again. Says
nothing of what a value means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.protocol.bounds import DEPTH, LARGEST_INT, SMALLEST_INT, VALUES

_MOST_ECHO = 64
_PLAIN_NAME = re.compile(r"[\w$-]+", re.ASCII)
_NO_UNICODE = "is not valid Unicode: it holds a lone surrogate"


def check_body(body: dict[str, Any], most_values: int = VALUES.most) -> None:
    """Checks each member of a body. A member's own whole number is left to its type, which may clip it.

    Args:
        most_values: values and members in all.

    Raises:
        RequestError: 400; names the place of what is wrong, like `tools[0].function.parameters`.
    """
    left = most_values
    for name, value in body.items():
        if not _is_unicode(name):
            raise RequestError(f"a member's name {_NO_UNICODE}")
        if type(value) is not int:
            left -= 1 + check_json(value, name[:_MOST_ECHO], left)


def check_json(value: Any, where: str, most_values: int = VALUES.most) -> int:
    """Checks a value, level by level: a deep one must not overflow a stack here either.

    Args:
        where: its place in the body.

    Returns:
        How many values and members it holds.

    Raises:
        RequestError: 400; names the place of what is wrong.
    """
    level, count, above = [value], 0, list[list[Any]]()  # above: the arrays and objects of each level before
    while level:
        count += len(level)
        if count > most_values:
            raise RequestError(f"{where}: the body holds more than {VALUES.what}", param=where)
        kinds = set(map(type, level))
        _check_scalars(level, kinds, above, where)
        within = [part for part in level if type(part) in (list, dict)] if kinds & {list, dict} else []
        if within and len(above) == DEPTH.most:
            raise _refusal(within[0], f"is nested too deeply: at most {DEPTH.most} levels", above, where)
        level = []
        for part in within:
            if type(part) is dict:
                count += len(part)
                if not all(map(_is_unicode, part)):
                    raise _refusal(part, _NO_UNICODE, above, where)
                level += part.values()
            else:
                level += part
        above.append(within)
    return count


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell and nobody can encode."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_scalars(values: list[Any], kinds: set[type], above: list[list[Any]], where: str) -> None:
    if int in kinds:
        numbers = values if kinds == {int} else [value for value in values if type(value) is int]
        for value in (min(numbers), max(numbers)):
            if not SMALLEST_INT <= value <= LARGEST_INT:
                raise _refusal(value, "holds a whole number beyond 64 bits", above, where)
    if float in kinds:
        why = "holds a number that no 64-bit float can be, or that is none"
        for value in values:
            if type(value) is float and not math.isfinite(value):
                raise _refusal(value, why, above, where)
    if str in kinds:
        for value in values:
            if type(value) is str and not _is_unicode(value):
                raise _refusal(value, _NO_UNICODE, above, where)


def _refusal(value: Any, why: str, above: list[list[Any]], where: str) -> RequestError:
    place = _place(value, above, where)
    return RequestError(f"{place} {why}", param=place)


def _place(value: Any, above: list[list[Any]], where: str) -> str:
    """Where a value lies: as many steps as short and plain names have room for.

    Args:
        above: the arrays and objects of each level above it.
        where: the place of the first level.
    """
    steps: list[int | str] = []
    for within in reversed(above):
        value, step = next((part, step) for part in within for step, inner in _members(part) if inner is value)
        steps.append(step)
    for step in reversed(steps):
        if isinstance(step, str) and not _PLAIN_NAME.fullmatch(step):
            break
        longer = f"{where}.{step}" if isinstance(step, str) else f"{where}[{step}]"
        if len(longer) > _MOST_ECHO:
            break
        where = longer
    return where


def _members(part: list[Any] | dict[str, Any]) -> Iterable[tuple[int | str, Any]]:
    return part.items() if isinstance(part, dict) else enumerate(part)
