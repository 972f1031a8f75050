"""The documentation as tests read it: its pages, and the blocks of code in them with the mark that stands above."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = (
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
NOT_RUN, RUN_BY = "not run", "run by"
_BLOCK = re.compile(
    rf"^(?:<!-- (?P<mark>{NOT_RUN}|{RUN_BY}): (?P<why>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code. `mark` is NOT_RUN (`why` is the reason), RUN_BY (`why` is a test), or None."""

    page: Path
    language: str
    text: str
    mark: str | None
    why: str


def read(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(page, found["language"], found["text"], found["mark"], found["why"] or "")
        for found in _BLOCK.finditer(read(page))
    ]


def commands() -> list[Block]:
    """All blocks that a reader may run."""
    return [block for page in PAGES for block in blocks(page) if block.language in ("bash", "python")]


def without_blocks(page: Path) -> str:
    """A page's text without its blocks of code."""
    return _BLOCK.sub("", read(page))
