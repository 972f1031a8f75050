"""Command line for one server: start, stop, status, logs. What it does is in `server`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import typer

from scripts.common.addresses import asked_address, is_free, url_of
from scripts.common.console import fail, progress, say
from scripts.common.machine import MachineError
from scripts.pack.archive import STARTUP_KEY
from scripts.serve import health, server
from scripts.serve.drain import DRAIN_S
from scripts.serve.find_run import Ambiguous, NotFound, find_run
from scripts.serve.run_dir import HOST, Ports, Record, RunDir
from scripts.serve.worker_log import LogTail

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
RUN_DIR = typer.Option(..., help="folder of the server: logs, configuration, temporary files")
ARCHIVE = typer.Option(..., help="the .mar to serve")
NAME = typer.Option(..., help="name under which TorchServe serves the model")
PORT = typer.Option(8080, min=1024, max=65529, help="inference; +1 management, +2 and +3 metrics, +5 and +6 gRPC")
TIMEOUT = typer.Option(None, help="give up after so many seconds; default: the archive's startupTimeout and a minute")
POLL_S = 0.2
BIND = typer.Option(HOST, help="address of the inference port; beyond loopback every call needs a token")
TOKENS = typer.Option(True, help="whether calls from beyond loopback need a token; never without a private network")
SERVER_START_S = 60.0  # of TorchServe itself, beside the load
TORCHSERVE_STARTUP_S = 120.0  # its own startupTimeout
CANARY_S = 60.0  # the first token of a server that was not warmed up
FIND_PORT = typer.Option(None, help="finds the server by its inference port where `run-dir` has none")
DRAIN = typer.Option(DRAIN_S, min=0, help="seconds that running requests have to end")


@dataclass(frozen=True)
class Launch:
    """How a server is started: the options that `start` and `run` share."""

    run_dir: Path = RUN_DIR
    archive: Path = ARCHIVE
    name: str = NAME
    port: int = PORT
    host: str = BIND
    tokens: bool = TOKENS
    timeout_s: float | None = TIMEOUT

    @property
    def folder(self) -> RunDir:
        """The server's folder."""
        return RunDir(self.run_dir.resolve())


def launches(command: Callable[..., None]) -> Callable[..., None]:
    """A command that is called with a `Launch` first, as Typer reads it: the options of both."""

    shared = signature(Launch, eval_str=True).parameters
    own = list(signature(command, eval_str=True).parameters.values())[1:]

    def with_options(**options: Any) -> None:
        command(Launch(**{name: options.pop(name) for name in shared}), **options)

    found = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*shared.values(), *own)]
    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__signature__ = Signature(found)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in found}
    return with_options


@app.command()
@launches
def start(wanted: Launch) -> None:
    """Start TorchServe and wait until the model answers; on failure say why and stop it again."""
    launch(wanted)


@app.command()
@launches
def run(wanted: Launch, drain_s: float = DRAIN) -> None:
    """Start and stay, for containers: SIGTERM or SIGINT drains and stops, a second one stops at once."""
    folder, signals = wanted.folder, list[int]()

    def note(number: int, _: object) -> None:
        signals.append(number)

    record = launch(wanted)
    on_signals(note)
    tail = LogTail(folder.model_log)
    while not signals and server.is_alive(folder, record):
        for line in tail.new_lines():
            typer.echo(line)
        reap_children()
        time.sleep(POLL_S)
    if not signals:
        server.stop(folder)
        fail(f"TorchServe ended: {server.last_line(folder.server_log)}")
    say(f"draining for up to {drain_s:.0f} s; a second signal ends at once")
    killed = server.stop(folder, drain_s, lambda: len(signals) > 1, say)
    say("stopped" + (f" ({killed} processes had to be killed)" if killed else ""))


def interrupt(*_: object) -> None:
    """While the server starts and the model loads, a signal ends the start."""
    raise KeyboardInterrupt


def on_signals(handler: Callable[[int, object], None]) -> None:
    """Ctrl-C, SIGTERM and a terminal that closes call `handler` from now on; `nohup` is respected."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def reap_children() -> None:
    """As process 1 of a container we inherit what others leave: nobody else would take their exit codes."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def launch(wanted: Launch) -> Record:
    """Start the server and return when the model has given a token; on failure say why and stop it again."""
    run, name, archive, ports = wanted.folder, wanted.name, wanted.archive, Ports(wanted.port)
    started_s = time.monotonic()
    on_signals(interrupt)
    try:
        record = server.start(run, name, archive.resolve(), ports, wanted.host, wanted.tokens)
    except (server.ServerError, MachineError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; nothing runs")
    asked = asked_address(record.host)
    try:
        say(f"TorchServe started in {run.path}")
        allowed_s = server.read_archive(archive).get(STARTUP_KEY, TORCHSERVE_STARTUP_S)
        limit_s = allowed_s + SERVER_START_S if wanted.timeout_s is None else wanted.timeout_s
        with progress(f"loading {name}") as show:
            server.wait_until_ready(run, record, elapsed(show, started_s), limit_s)
        found = health.check(ports, name, run.key_file, CANARY_S, asked)
        if found.state is not health.State.READY:
            raise server.ServerError(f"loaded, but {found.line()}")
    except server.ServerError as error:
        server.stop(run)
        fail(f"{error}\nlogs: {run.logs}")
    except KeyboardInterrupt:
        server.stop(run)
        fail("interrupted; the server was stopped")
    say(f"ready after {time.monotonic() - started_s:.1f} s: {url_of(asked, ports.inference)}/predictions/{name}")
    if run.key_file.is_file():
        say("calls need a token: `make token` prints it")
    return record


def elapsed(show: Callable[[str], None], started_s: float) -> Callable[[str], None]:
    """`show` with the seconds since the start in front of each line."""
    return lambda stage: show(f"{time.monotonic() - started_s:6.1f} s  {stage}")


@app.command()
def stop(run_dir: Path = RUN_DIR, port: int | None = FIND_PORT, drain_s: float = DRAIN) -> None:
    """Refuse new requests, let the running ones end, stop the server. A second `stop` beside it ends at once."""
    try:
        run = find_run(run_dir, port)
    except NotFound as error:
        if isinstance(error, Ambiguous):
            fail(str(error))
        if port is not None and not is_free(port, "0.0.0.0"):
            fail(f"{error}; another program listens on port {port}")
        say(str(error))
        return
    killed = server.stop(run, drain_s, tell=say)
    say(f"stopped the server in {run.path}" + (f" ({killed} processes had to be killed)" if killed else ""))


@app.command()
def status(run_dir: Path = RUN_DIR, port: int | None = FIND_PORT) -> None:
    """Show model, ports, processes and uptime."""
    try:
        lines = server.status(find_run(run_dir, port))
    except NotFound as error:
        lines = [str(error)]
    for line in lines:
        typer.echo(line)


@app.command()
def logs(
    run_dir: Path = RUN_DIR,
    port: int | None = FIND_PORT,
    follow: bool = typer.Option(False, help="go on showing new lines until interrupted"),
) -> None:
    """Print what the workers wrote."""
    run = RunDir(run_dir.resolve())
    if not run.model_log.is_file():
        with suppress(NotFound):
            run = find_run(run_dir, port)
    if not run.model_log.is_file():
        fail(f"no log in {run.logs}: nothing was started there")
    tail = LogTail(run.model_log)
    while True:
        for line in tail.new_lines():
            typer.echo(line)
        if not follow:
            return
        time.sleep(0.5)
