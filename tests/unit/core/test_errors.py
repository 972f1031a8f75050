"""A library's error as a part of one of our lines."""

from __future__ import annotations

import pytest

from dsserve.core.errors import LoadError, first_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("\n CUDA error: no\nAt line 7"), "CUDA error: no"),
        (RuntimeError(), "RuntimeError"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_first_line_says_what_happened_and_is_never_empty(error: Exception, words: str) -> None:
    assert first_line(error) == words


def test_a_load_error_is_one_line() -> None:
    assert str(LoadError("model-config.yaml:\n  no such\tkey")) == "model-config.yaml: no such key"
