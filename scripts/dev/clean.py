"""Remove what `make` made: archives, run directories of stopped servers, the converted demo model, caches."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from scripts.common.console import fail, say
from scripts.common.paths import DEMO_MODEL, ROOT
from scripts.serve.processes import find_marked

CACHES = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "dist", "site")


def running(root: Path) -> list[Path]:
    """Run directories in which processes are still alive."""
    return [folder for folder in sorted((root / "run").glob("*")) if find_marked(folder)]


def clean(root: Path) -> list[Path]:
    """Remove generated files under `root` and return their paths. Leaves the virtual environment and users' models."""
    targets = [root / "run", root / "models" / DEMO_MODEL, *(root / name for name in CACHES)]
    targets += sorted((root / "model-store").glob("*.mar"))
    for package in ("handlers", "scripts", "tests"):
        targets += sorted((root / package).rglob("__pycache__"))
    targets = [target for target in targets if target.exists()]
    for target in targets:
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink()
    return targets


def main() -> None:
    """Remove generated files, unless a server still runs."""
    alive = running(ROOT)
    if alive:
        fail(f"servers are running in {', '.join(str(path) for path in alive)}: end them with `make stop RUN_DIR=...`")
    for target in clean(ROOT):
        say(f"removed {target.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
