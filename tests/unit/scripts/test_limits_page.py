"""docs/limits.md says what bodies are really checked with."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from dsserve.protocol import bounds
from dsserve.protocol.bounds import Bound, Rule
from scripts.docs import limits_page


def test_the_page_is_what_the_bounds_say() -> None:
    assert limits_page.main(["--check"]) == 0, "run python -m scripts.docs.limits_page"


def test_a_bound_that_changes_makes_the_page_untrue(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tuple(Bound(one.what, one.most + 1) if one is bounds.DEPTH else one for one in bounds.LIMITS)
    monkeypatch.setattr(limits_page, "SOURCES", (changed,))
    assert limits_page.main(["--check"]) == 1


def test_every_bound_stands_in_the_table_and_is_used() -> None:
    """A bound that nothing checks would be a promise that nobody keeps."""
    page = limits_page.PAGE.read_text(encoding="utf-8")
    sources = [path.read_text() for path in Path(bounds.__file__).parents[1].rglob("*.py") if path.name != "bounds.py"]
    for name, limit in vars(bounds).items():
        if isinstance(limit, Bound | Rule):
            assert f"| {limit.what} |" in page
        if isinstance(limit, Bound):
            assert any(len(re.findall(rf"\b{name}\b", source)) > 1 for source in sources), name  # not imported alone


def test_settings_that_the_page_names_are_there() -> None:
    fields = importlib.import_module("dsserve.config.handler").HandlerConfig.model_fields
    for limit in bounds.LIMITS:
        if limit.setting.startswith("handler."):
            assert set(limit.setting.removeprefix("handler.").split(", ")) <= set(fields), limit
