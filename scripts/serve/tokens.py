"""The tokens of a server that listens beyond loopback: print one, or let TorchServe make a new one.

TorchServe writes them into the run directory's key_file.json, for its user alone (mode 600). Prints to stdout only.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from scripts.common.addresses import LOOPBACK, url_of
from scripts.common.console import fail
from scripts.common.web import OK, Unreachable, request_json
from scripts.serve.find_run import NotFound, find_run
from scripts.serve.run_dir import Ports, RunDir


class Kind(str, Enum):
    """What a token opens."""

    inference = "inference"
    management = "management"


def rotate(run: RunDir, ports: Ports, kind: Kind) -> None:
    """A new token in place of the old one, which is refused from now on. Raises Unreachable, ValueError."""
    url = url_of(LOOPBACK, ports.management, f"/token?type={kind.value}")
    status, reply = request_json(url, token=run.token("API"))
    if status != OK:
        raise ValueError(f"TorchServe refuses a new token: {status} {reply}")


def main(
    run_dir: Path = typer.Option(..., help="folder of the server"),
    port: int = typer.Option(8080, help="inference port"),
    kind: Kind = typer.Option(Kind.inference, help="which token"),
    new: bool = typer.Option(False, "--new", help="make a new one first; the old one is refused from then on"),
) -> None:
    """Print a token of the server."""
    try:
        run = find_run(run_dir, port)
    except NotFound as error:
        fail(str(error))
    if run.token(kind.value) is None:
        fail(f"no token in {run.path}: servers on loopback ask for none (HOST=0.0.0.0 makes them)")
    if new:
        try:
            rotate(run, Ports(port), kind)
        except (Unreachable, ValueError) as error:
            fail(str(error))
    typer.echo(run.token(kind.value))


if __name__ == "__main__":
    typer.run(main)
