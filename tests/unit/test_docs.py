"""README and docs: commands are run or say why not, links lead somewhere, tables are today's, sentences are short."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsserve.config.deepspeed import _OUR_KEYS
from dsserve.config.handler import AUTO_RUNNING, AUTO_TOKENS, HandlerConfig
from dsserve.config.torchserve import _REQUIRED
from scripts.docs import api_page, settings_page
from scripts.docs.page_tables import field_table, with_tables
from tests.conftest import ROOT
from tests.e2e.test_readme import RUN_HERE
from tests.support.pages import NOT_RUN, PAGES, RUN_BY, Block, blocks, commands, read, without_blocks

LANGUAGES = {"bash", "python", "text", "properties", "yaml", "json"}
COMMAND = re.compile(
    r"^\s*(\$ |make |curl |python |pip |kubectl |docker |git |export |haproxy |prometheus )", re.MULTILINE
)
FOLDERS = "handlers|scripts|tests|configs|docs|.github"
MOST_WORDS = 25
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_read_once_and_names_the_test_command() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 250
    assert "`make test`" in read(ROOT / "README.md")


@pytest.mark.parametrize("block", commands(), ids=lambda block: f"{block.page.stem}: {block.text[:40]!r}")
def test_every_command_is_run_or_says_why_not(block: Block) -> None:
    if block.mark is None and block.text != "make setup\nmake test-unit\n":  # how this very test was started
        assert block.text in RUN_HERE, "run it in tests/e2e/test_readme.py, or write <!-- not run: why --> above it"
    if block.mark == NOT_RUN:
        assert len(block.why.split()) >= 3, "say why"
        assert all((ROOT / name).is_file() for name in re.findall(r"tests/[\w/.-]+", block.why))
    if block.mark == RUN_BY:
        assert f'"{block.page.name}"' in read(ROOT / block.why), "that test does not read this page"


def test_what_is_run_stands_in_the_pages() -> None:
    shown = [block.text for block in commands() if block.mark is None]
    assert sorted(set(RUN_HERE) - set(shown)) == [] and len(RUN_HERE) == len(set(RUN_HERE))


@pages
def test_no_command_hides_in_another_block(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.text[:60]!r}: name the block's language"
        assert block.language in ("bash", "python") or not COMMAND.search(block.text), block.text


@pages
def test_what_a_page_names_exists(page: Path) -> None:
    text = read(page)
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, flags=re.MULTILINE)) <= targets
    for module in re.findall(r"python -m ((?:scripts|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert (ROOT / name).exists() or name == "configs/measurements/", name


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs both write them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_blocks(page)):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_site_has_every_page_once() -> None:
    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        children = node.values() if isinstance(node, dict) else node
        assert not isinstance(children, (str, int)) and children is not None
        return [leaf for child in children for leaf in leaves(child)]  # type: ignore[attr-defined]

    listed = leaves(yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(listed) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents
    )


@pytest.mark.parametrize("page", [settings_page, api_page], ids=["settings", "api"])
def test_generated_tables_are_todays(page: object) -> None:
    text = read(page.PAGE)  # type: ignore[attr-defined]
    assert with_tables(text, page.tables()) == text, f"run python -m {page.__name__}"  # type: ignore[attr-defined]


def test_keys_without_a_model_are_described_too() -> None:
    text = read(settings_page.PAGE)
    assert all(f"`{key}`" in text for key in (*_REQUIRED, *_OUR_KEYS))


def test_the_defaults_in_readme_are_those_of_the_model() -> None:
    shown = dict(re.findall(r"^\| `handler\.(\w+)` \| (\d+)", read(ROOT / "README.md"), flags=re.MULTILINE))
    auto = {name: int(shown.pop(name)) for name in ("max_running", "max_num_batched_tokens")}
    assert list(auto.values()) == [AUTO_RUNNING["cuda"], AUTO_TOKENS["large"]] and len(shown) == 1
    assert {name: int(HandlerConfig.model_fields[name].default) for name in shown} == {
        k: int(v) for k, v in shown.items()
    }


def test_a_missing_mark_is_said() -> None:
    with pytest.raises(KeyError, match="marks for"):
        with_tables("no marks", {"handler": "table"})


def test_a_key_is_described_once() -> None:
    for page in (settings_page, api_page):
        for table in page.tables().values():
            names = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
            assert len(names) == len(set(names))
            assert not re.findall(r"\|  \|$", table, flags=re.MULTILINE), "a field without a description"


def test_ranges_in_words() -> None:
    table = field_table(api_page.SamplingBody, "parameter")
    assert "| `temperature` | 1 | number 0 to 2 |" in table
    assert "| `seed` | none | integer -2^63 to 2^63 - 1 |" in table
    assert "| `top_p` | none | number above 0, at most 1 |" in table


def sentences(page: Path) -> list[str]:
    """Of the running text: neither tables nor code nor headings. A list's entry ends a sentence."""
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", without_blocks(page), flags=re.DOTALL)
    text = re.sub(r"^(\||#|<!--|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n(?=\s*([-*]|\d+\.) )", "\n\n", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [one for part in paragraphs for one in re.split(r"(?<=[.:;?!])[)*]*\s+", part)]


@pages
def test_sentences_are_short(page: Path) -> None:
    long = [one for one in sentences(page) if len(re.findall(r"[A-Za-z]+[\w'-]*", one)) > MOST_WORDS]
    assert long == []


def beside_vllm(page: str, columns: slice) -> list[tuple[str, list[str]]]:
    """Load and some figures of each row of a page's table beside vLLM."""
    table = read(ROOT / page).split("| prompt / new tokens")[1].split("\n\n")[0]
    cells = [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(re.sub(r"\W+", " ", " ".join(row[: columns.start])), row[columns]) for row in cells]


def test_the_tables_beside_vllm_are_the_measured_figures() -> None:
    rows = json.loads(read(ROOT / "configs" / "measurements" / "h200-8b.json"))["rows"]

    def load(row: dict[str, Any]) -> str:
        return " ".join(map(str, (row["prompt_new"] or ["mixed", "lengths"]) + [row["streams"]]))

    def figures(row: dict[str, Any], name: str) -> list[str]:
        return [" / ".join(map(str, item)) if isinstance(item, list) else f"{item}" for item in row[name].values()]

    whole = {load(row): figures(row, "vllm") + figures(row, "ours") for row in rows}
    assert dict(beside_vllm("docs/performance.md", slice(1, 10))) == whole
    for name, shown in beside_vllm("README.md", slice(2, 7)):
        vllm, ours = whole[name][:4], whole[name][4:]
        assert shown == [vllm[0], vllm[3], ours[0], ours[3], ours[4]], name
