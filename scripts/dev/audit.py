"""Known vulnerabilities of the exact versions in constraints.txt, by pip-audit against the OSV database.

The database is on the internet: without it nothing can be said, and nothing is claimed. Looks at packages only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import typer

from scripts.common.console import fail, say
from scripts.common.paths import ROOT

SERVICE = "https://api.osv.dev/"
TIMEOUT_S = 5.0


def is_reachable(url: str = SERVICE) -> bool:
    """Whether anything answers there."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500  # it has no page at its root
    except OSError:
        return False


def exact_versions(constraints: str) -> list[str]:
    """The lines `name==version`, without the marker of the Python version: each is looked up for itself."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in constraints.splitlines())
    return [line for line in lines if "==" in line]


def audit(requirements: list[str]) -> int:
    """The worst exit code of pip-audit, which prints a table. A package that stands there twice needs two runs."""
    runs: list[dict[str, str]] = []
    for line in requirements:
        name = line.partition("==")[0]
        free = next((run for run in runs if name not in run), None)
        if free is None:
            free = {}
            runs.append(free)
        free[name] = line
    worst = 0
    for run in runs:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(run.values()) + "\n")
            file.flush()
            command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
            worst = max(worst, subprocess.run([*command, "--vulnerability-service", "osv"], check=False).returncode)
    return worst


def main(
    if_possible: bool = typer.Option(False, "--if-possible", help="succeed, and say so, where it cannot be done"),
) -> None:
    """Exit code 0 if no known vulnerability was found."""
    lacks = None
    if find_spec("pip_audit") is None:
        lacks = "pip-audit is not installed (`make audit` installs it)"
    elif not is_reachable():
        lacks = f"{SERVICE} cannot be reached from here"
    if lacks:
        if not if_possible:
            fail(f"dependencies were not audited: {lacks}")
        say(f"dependencies were NOT audited: {lacks}")
        return
    raise typer.Exit(code=audit(exact_versions((ROOT / Path("constraints.txt")).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    typer.run(main)
