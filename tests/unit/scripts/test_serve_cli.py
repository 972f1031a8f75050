"""`start` and `run` take the same options, which are stated once, and both hand them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scripts.serve import cli
from scripts.serve.run_dir import HOST

WORDS = ["--run-dir", "run/a", "--archive", "a.mar", "--name", "a", "--port", "9000", "--no-tokens"]


def options(command: str) -> dict[str, Any]:
    group = typer.main.get_command(cli.app)
    return {one.name: (one.opts, one.default, one.help) for one in group.commands[command].params}  # type: ignore[attr-defined]


def test_run_takes_what_start_does_and_how_long_it_drains() -> None:
    start, run = options("start"), options("run")
    assert list(start) == ["run_dir", "archive", "name", "port", "host", "tokens", "timeout_s"]
    assert {name: run[name] for name in start} == start and set(run) - set(start) == {"drain_s"}


def test_what_is_said_reaches_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[cli.Launch] = []
    monkeypatch.setattr(cli, "launch", launched.append)
    assert CliRunner().invoke(cli.app, ["start", *WORDS]).exit_code == 0
    assert launched == [cli.Launch(Path("run/a"), Path("a.mar"), "a", 9000, HOST, False, None)]
    assert launched[0].folder.path == Path("run/a").resolve()


def test_an_option_that_is_missing_or_wrong_is_named() -> None:
    for words, named in ((WORDS[2:], "--run-dir"), ([*WORDS, "--port", "80"], "--port")):
        for command in ("start", "run"):
            found = CliRunner().invoke(cli.app, [command, *words])
            assert found.exit_code == 2 and named in found.output
