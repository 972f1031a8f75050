"""Bounds of any JSON value that a client sends: how deep, how many, which numbers, which strings.

Whoever hands a value on, to a template, a grammar or an encoder, may rely on them. Says nothing of what a value means.
"""

from __future__ import annotations

import math
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.protocol.bounds import DEPTH, LARGEST_INT, SMALLEST_INT, VALUES

_MOST_ECHO = 64


def check_body(body: dict[str, Any], most_values: int = VALUES.most) -> None:
    """Checks each member of a body. A member's own whole number is left to its type, which may clip it.

    Args:
        most_values: values and members in all.

    Raises:
        RequestError: 400; names the member.
    """
    left = most_values
    for name, value in body.items():
        check_text(name, None)
        if type(value) is not int:
            left -= 1 + check_json(value, name[:_MOST_ECHO], left)


def check_json(value: Any, param: str, most_values: int = VALUES.most) -> int:
    """Checks a value, level by level: a deep one must not overflow a stack here either.

    Returns:
        How many values and members it holds.

    Raises:
        RequestError: 400; names `param`.
    """
    level, depth, count = [value], 0, 0
    while level:
        count += len(level)
        if count > most_values:
            raise RequestError(f"{param}: the body holds more than {VALUES.what}", param=param)
        kinds = set(map(type, level))
        _check_scalars(level, kinds, param)
        within = [part for part in level if type(part) in (list, dict)] if kinds & {list, dict} else []
        depth += bool(within)
        if depth > DEPTH.most:
            raise RequestError(f"{param} is nested too deeply: at most {DEPTH.most} levels", param=param)
        level = []
        for part in within:
            if type(part) is dict:
                count += len(part)
                for name in part:
                    check_text(name, param)
                level += part.values()
            else:
                level += part
    return count


def check_text(text: str, param: str | None) -> None:
    """Checks a string of a member, or (None) the name of a member.

    Raises:
        RequestError: 400 for a lone surrogate, which JSON can spell and nobody can encode.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        what = param or "a member's name"
        raise RequestError(f"{what} is not valid Unicode: it holds a lone surrogate", param=param) from None


def _check_scalars(values: list[Any], kinds: set[type], param: str) -> None:
    if int in kinds:
        numbers = values if kinds == {int} else [value for value in values if type(value) is int]
        if min(numbers) < SMALLEST_INT or max(numbers) > LARGEST_INT:
            raise RequestError(f"{param} holds a whole number beyond 64 bits", param=param)
    if float in kinds and not all(math.isfinite(value) for value in values if type(value) is float):
        raise RequestError(f"{param} holds a number that no 64-bit float can be, or that is none", param=param)
    if str in kinds:
        for value in values:
            if type(value) is str:
                check_text(value, param)
