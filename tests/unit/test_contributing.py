"""CONTRIBUTING's tasks name the files that they touch: where the code names one that exists, a new one goes, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.pages import read

# Task -> what names something that was added that way before, each in the places of the code that had to know of it.
EXAMPLES = {
    "A sampling parameter": r"\btypical_p\b|\bfrequency_penalty\b",
    "An injected architecture": r"gpt_?j\b|gpt_?neo_?x",
    "A metric": r"kv_cache_usage_perc",
    "An endpoint": r"v1/tokenize|\bTokenizeBody\b|\bCompletionBody\b",
    "Another attention kernel": r"\bTritonAttention\b",
    "Another archive format": r"\.mar\b",
}
SOURCES = ("handlers", "scripts", "configs")
KINDS = {".py", ".sh", ".yml", ".yaml", ".cfg", ".json"}
# They measure what is there, and need not know what is new.
ASIDE = ("scripts/bench", "scripts/capacity", "configs/measurements")
FILE = re.compile(r"`((?:handlers|scripts|configs|tests|docs)/[\w/.-]+\.\w+|Makefile)`")
tasks = pytest.mark.parametrize("task", EXAMPLES)


def sections() -> dict[str, str]:
    """Task -> its part of the page."""
    page = read(ROOT / "CONTRIBUTING.md").split("## How to add\n")[1].split("\n## ")[0]
    return dict(part.split("\n", 1) for part in page.split("\n### ")[1:])


def steps(task: str) -> list[str]:
    """The task's numbered steps."""
    return re.split(r"^\d+\. ", sections()[task], flags=re.MULTILINE)[1:]


def sources() -> dict[str, str]:
    """Path -> text of what is written by hand or made from it, without tests and docs. A module names itself."""
    found = [ROOT / "Makefile", *(path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*")))]
    names = {path: str(path.relative_to(ROOT)) for path in found if path.suffix in KINDS or path.name == "Makefile"}
    return {name: text_of(path) for path, name in names.items() if not name.startswith(ASIDE)}


def text_of(path: Path) -> str:
    return f"{path.stem}\n{path.read_text(encoding='utf-8')}"


def test_the_page_has_the_six_tasks() -> None:
    assert list(sections()) == list(EXAMPLES)


@tasks
def test_every_file_that_names_an_earlier_one_is_listed(task: str) -> None:
    touched = {name for name, text in sources().items() if re.search(EXAMPLES[task], text, flags=re.IGNORECASE)}
    assert touched, f"nothing is called {EXAMPLES[task]} any more: choose another example"
    listed = set(FILE.findall(sections()[task]))
    assert touched <= listed, f"CONTRIBUTING, {task}: list {sorted(touched - listed)} or say why not"


@tasks
def test_every_file_that_is_listed_knows_an_earlier_one(task: str) -> None:
    """But for those that a task touches only under a condition, and for what is generated, tests and docs."""
    texts = sources()
    for step in steps(task):
        is_conditional = re.search(r"\b[Ii]f\b|Run `", step)
        for name in set(FILE.findall(step)) & set(texts):
            knows = re.search(EXAMPLES[task], texts[name], flags=re.IGNORECASE)
            assert is_conditional or knows, f"CONTRIBUTING, {task}: {name} names nothing of the kind"


@tasks
def test_every_task_names_tests_and_files_that_exist(task: str) -> None:
    named = set(FILE.findall(sections()[task]))
    assert any(name.startswith("tests/") for name in named)
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


def test_a_sampling_parameter_touches_three_source_files() -> None:
    by_hand = [step for step in steps("A sampling parameter") if FILE.match(step)]
    assert len(by_hand) == 3 and all(step.startswith("`handlers/") for step in by_hand)
