"""Command line for one server: start, stop, status, logs. What it does is in `server`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import typer

from scripts import server
from scripts.console import fail, progress, say
from scripts.machine import MachineError
from scripts.run_dir import HOST, Ports, RunDir
from scripts.worker_log import LogTail

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
RUN_DIR = typer.Option(..., help="folder of the server: logs, configuration, temporary files")


@app.command()
def start(
    run_dir: Path = RUN_DIR,
    archive: Path = typer.Option(..., help="the .mar to serve"),
    name: str = typer.Option(..., help="name under which TorchServe serves the model"),
    port: int = typer.Option(8080, min=1024, max=65529, help="inference; +1 management, +2 metrics, +5 and +6 gRPC"),
    timeout_s: float = typer.Option(server.START_TIMEOUT_S, help="give up after so many seconds"),
) -> None:
    """Start TorchServe and wait until the model is ready; on failure say why and stop it again."""
    run, ports = RunDir(run_dir.resolve()), Ports(port)
    started_s = time.monotonic()
    try:
        record = server.start(run, name, archive.resolve(), ports)
    except (server.ServerError, MachineError) as error:
        fail(str(error))
    say(f"TorchServe started in {run.path}")
    try:
        with progress(f"loading {name}") as show:
            server.wait_until_ready(run, record, elapsed(show, started_s), timeout_s)
    except server.ServerError as error:
        server.stop(run)
        fail(f"{error}\nlogs: {run.logs}")
    except KeyboardInterrupt:
        server.stop(run)
        fail("interrupted; the server was stopped")
    say(f"ready after {time.monotonic() - started_s:.1f} s: http://{HOST}:{port}/predictions/{name}")


def elapsed(show: Callable[[str], None], started_s: float) -> Callable[[str], None]:
    """`show` with the seconds since the start in front of each line."""
    return lambda stage: show(f"{time.monotonic() - started_s:6.1f} s  {stage}")


@app.command()
def stop(run_dir: Path = RUN_DIR) -> None:
    """Stop the server and all its workers."""
    killed = server.stop(RunDir(run_dir.resolve()))
    if killed is None:
        say(f"no server runs in {run_dir}")
    else:
        say("stopped" + (f" ({killed} processes had to be killed)" if killed else ""))


@app.command()
def status(run_dir: Path = RUN_DIR) -> None:
    """Show model, ports, processes and uptime."""
    for line in server.status(RunDir(run_dir.resolve())):
        typer.echo(line)


@app.command()
def logs(
    run_dir: Path = RUN_DIR,
    follow: bool = typer.Option(False, help="go on showing new lines until interrupted"),
) -> None:
    """Print what the workers wrote."""
    run = RunDir(run_dir.resolve())
    if not run.model_log.is_file():
        fail(f"no log in {run.logs}: nothing was started there")
    tail = LogTail(run.model_log)
    while True:
        for line in tail.new_lines():
            typer.echo(line)
        if not follow:
            return
        time.sleep(0.5)


if __name__ == "__main__":
    app()
