"""Write the tables of docs/settings.md from the models that check the settings."""

from __future__ import annotations

from dsserve.config.handler import HandlerConfig
from scripts.docs.page_tables import DOCS, field_table, write

PAGE = DOCS / "settings.md"


def tables() -> dict[str, str]:
    """Each mark's table."""
    return {"handler": field_table(HandlerConfig, "`handler:`")}


if __name__ == "__main__":
    write(PAGE, tables())
