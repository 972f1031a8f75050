"""Marks tests by their folder and makes the real model that most of them run on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The folders, in the order in which they run: what is fast and tells most comes first.
KINDS = ("unit", "contract", "distributed", "e2e", "faults", "gpu")

# No test may look for a model on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As in a server: another ninja on the PATH would compile the operations anew, and the ranks' one once more.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def kind_of(item: pytest.Item) -> str:
    """The folder of a test under tests/."""
    return item.path.relative_to(ROOT / "tests").parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by its folder, and puts the folders in the order of KINDS. Within a folder nothing moves."""
    for item in items:
        if kind_of(item) in KINDS:
            item.add_marker(kind_of(item))
    items.sort(key=lambda item: KINDS.index(kind_of(item)) if kind_of(item) in KINDS else len(KINDS))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, converted once."""
    from scripts.model.prepare import prepare

    return Path(prepare("smollm2"))
