"""Write the tables of docs/limits.md from the bounds that bodies are checked with; `--check` says if they are true.

    python -m scripts.docs.limits_page [--check]

The text around them is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from dsserve.protocol import bounds, schema_bounds
from dsserve.protocol.bounds import Bound, Rule
from dsserve.protocol.openai.openapi import describe
from scripts.common.paths import ROOT

PAGE = ROOT / "docs" / "limits.md"
# What the tables are made of; a module with bounds of its own joins its `LIMITS` here.
SOURCES: tuple[tuple[Bound | Rule, ...], ...] = (bounds.LIMITS, schema_bounds.LIMITS)
BEGIN, END = "<!-- made by scripts/docs/limits_page.py: begin -->", "<!-- made by scripts/docs/limits_page.py: end -->"
_BODIES = {"GenerateBody": "plain", "CompletionBody": "completions", "ChatBody": "chat"}
_AT_ONCE = 200  # a bound that refuses nothing


def tables() -> str:
    """The two tables, in Markdown."""
    lines = ["| limit | value | setting | status |", "| --- | --- | --- | --- |"]
    for limit in (limit for source in SOURCES for limit in source):
        value = f"{limit.most:,}" if isinstance(limit.most, int) else limit.most
        status = "-" if limit.status == _AT_ONCE else str(limit.status)
        lines.append(f"| {limit.what} | {value} | {_code(limit.setting)} | {status} |")
    lines += ["", "| number | range | endpoints |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {numbers} | {', '.join(where)} |" for (name, numbers), where in _numbers().items()]
    return "\n".join(lines)


def _code(setting: str) -> str:
    return f"`{setting}`" if setting else "-"


def _numbers() -> dict[tuple[str, str], list[str]]:
    """The members that are numbers: name and range -> where it is so."""
    found: dict[tuple[str, str], list[str]] = {}
    schemas = describe()["components"]["schemas"]
    for body, endpoint in _BODIES.items():
        for name, schema in schemas[body]["properties"].items():
            for kind in _kinds(schema):
                found.setdefault((name, _range(kind)), []).append(endpoint)
    return found


def _kinds(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in schema.get("anyOf", [schema]):
        if kind.get("type") in ("integer", "number"):
            yield kind


def _range(kind: dict[str, Any]) -> str:
    least = kind.get("minimum", kind.get("exclusiveMinimum"))
    begins = "above" if "exclusiveMinimum" in kind else "from"
    most = f" to {kind['maximum']}" if "maximum" in kind else ""
    return f"{begins} {least}{most}"


def render(page: str) -> str:
    """The page with its tables as they should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Writes or checks the page; the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in arguments:
        return int(page != render(page))
    PAGE.write_text(render(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
