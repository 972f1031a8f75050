"""Tables of a documentation page that are generated from pydantic models, between two marks in the page.

Knows neither settings nor requests: `settings_page` and `api_page` name the models and the pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from scripts.common.paths import ROOT

DOCS = ROOT / "docs"
_NAMES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "object": "object"}


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between `<!-- generated: NAME -->` and `<!-- end -->`.

    Raises:
        KeyError: the page's marks and the tables are not the same.
    """
    found = re.findall(r"<!-- generated: (\w+) -->", page)
    if sorted(found) != sorted(tables):
        raise KeyError(f"the page has marks for {sorted(found)}, the tables are {sorted(tables)}")
    for name, table in tables.items():
        mark = f"<!-- generated: {name} -->"
        before, rest = page.split(mark)
        page = f"{before}{mark}\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return page


def write(path: Path, tables: Mapping[str, str]) -> None:
    """Writes today's tables into a page."""
    path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def field_table(model: type[BaseModel], heading: str, only: set[str] | None = None) -> str:
    """One row for each field: name, default, allowed values, description.

    Args:
        heading: the first column's.
        only: names of the fields; None: all.
    """
    schema = model.model_json_schema()
    rows = [f"| {heading} | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if only is None or name in only:
            found = schema["properties"][field.alias or name]
            meaning = (field.description or "").replace("|", r"\|")
            rows.append(
                f"| `{name}` | {_default(field.is_required(), field.default)} | {_allowed(found)} | {meaning} |"
            )
    return "\n".join(rows)


def _default(required: bool, value: Any) -> str:
    if required:
        return "required"
    if value is None or value in ([], {}):
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, without null: null means "left out"."""
    if "anyOf" in schema:
        kinds = [_allowed(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return ", or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        return f"object {schema['$ref'].rsplit('/', 1)[1]}"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{item}`" for item in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_allowed(schema.get('items', {}))}{_at_most(schema, 'maxItems', 'entries')}"
    words = _NAMES.get(schema.get("type", ""), "anything")
    if words in ("integer", "number"):
        return " ".join([words, *_range(schema)])
    return f"{words}{_at_most(schema, 'maxLength', 'characters')}{_at_most(schema, 'maxProperties', 'entries')}"


def _range(schema: Mapping[str, Any]) -> list[str]:
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return [f"{_number(low)} to {_number(high)}"]
    lowest = f"from {_number(low)}" if low is not None else f"above {_number(above)}" if above is not None else ""
    highest = f"at most {_number(high)}" if high is not None else ""
    return [", ".join(filter(None, (lowest, highest)))] if lowest or highest else []


def _number(value: float) -> str:
    """As people write it: bounds of 64 bits as powers of two."""
    for less in (0, 1):
        power = abs(int(value)) + less
        if power >= 2**53 and power & (power - 1) == 0:
            return f"{'-' if value < 0 else ''}2^{power.bit_length() - 1}{' - 1' * less}"
    return str(int(value)) if value == int(value) else f"{value:g}"


def _at_most(schema: Mapping[str, Any], key: str, unit: str) -> str:
    return f", at most {schema[key]} {unit}" if key in schema else ""
