"""The packages of dsserve stand on one another: each imports from those below it alone, so there is no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

# From the bottom to the top. `injection` and `loading` call what `modeling` proves; the worker puts all together.
STACK = [
    "core",
    "config",
    "kernels",
    "parallel",
    "kv",
    "attention",
    "sampling",
    "modeling",
    "injection",
    "loading",
    "runner",
    "engine",
    "protocol",
    "observability",
    "worker",
]
HANDLERS = ROOT / "handlers"
PACKAGE = HANDLERS / "dsserve"


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`; imports within functions count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from run_time_nodes(child)


def imported_packages(source: str) -> set[str]:
    """The packages of dsserve that a module imports from; the root's modules have none."""
    found = set()
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dsserve.")}
    return found & set(STACK)


def upward(package: str, source: str) -> set[str]:
    """Packages above its own that a module imports from."""
    return {name for name in imported_packages(source) if STACK.index(name) > STACK.index(package)}


def test_the_stack_names_every_package() -> None:
    assert sorted(STACK) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("package", STACK)
def test_a_package_imports_from_those_below_it_alone(package: str) -> None:
    found = {path.name: upward(package, path.read_text()) for path in (PACKAGE / package).rglob("*.py")}
    assert not {name: above for name, above in found.items() if above}


def test_every_form_of_an_import_is_seen() -> None:
    lines = [
        "from dsserve.engine import build",
        "import dsserve.worker.logs",
        "def f():\n    from dsserve import runner",
    ]
    assert upward("core", "\n".join(lines)) == {"engine", "worker", "runner"}
    assert not upward(
        "core", "if TYPE_CHECKING:\n    from dsserve.engine.build import Engine\nfrom dsserve.core import errors"
    )
