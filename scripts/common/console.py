"""Where the scripts speak: messages for people on stderr, results on stdout.

Works without the rich package, which a GPU host's own Python may lack: then there are plain lines.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer


def say(message: str) -> None:
    """Print one line for people."""
    print(message, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print `message` as an error and leave with exit code 1."""
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    say(message)
    raise typer.Exit(code=1)


@contextmanager
def extra(what: str) -> Iterator[None]:
    """The block follows a measurement and is no part of it: whatever fails in it is told in one line, and no more."""
    try:
        yield
    except Exception as error:
        say(f"left out: {what}: {' '.join(f'{type(error).__name__}: {error}'.split())}")


def print_report(table: Callable[[dict[str, Any]], str], report: dict[str, Any]) -> None:
    """What was measured: a table for people, and one JSON document as the last line, which no table keeps back."""
    with extra("the table"):
        typer.echo(table(report))
    typer.echo(json.dumps(report))


def exit_on_sigterm() -> None:
    """From now on SIGTERM ends this process as an exception, so that servers and ranks that it started end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with `title` on a terminal; yields a function that prints a line above it. Else plain lines."""
    console = rich_terminal()
    if console is None:
        say(f"{title} ...")
        yield say
        return
    with console.status(title):
        yield lambda line: console.print(line, markup=False, highlight=False)


def rich_terminal() -> Any:
    """rich's console for stderr if that is a terminal and rich is installed, else None."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None
