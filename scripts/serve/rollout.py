"""Rolling restart: replaces the served version of a model by another one, with no failed request.

Registers the new version beside the old one (memory for both is needed), asks it for a token, makes it the default,
waits until the old version has nothing running or waiting, and unregisters that. Requests that name a version are the
business of those who name it. Starts no server (`serve`).
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from scripts.common.addresses import LOOPBACK, asked_address, url_of
from scripts.common.console import fail, say
from scripts.common.paths import DEMO_MODEL
from scripts.common.web import Unreachable, request_json
from scripts.serve import drain, health, management, server
from scripts.serve.find_run import describe, has_server, running
from scripts.serve.run_dir import HOST, Ports, RunDir
from scripts.serve.worker_log import LogTail, find_error

READY_S = 600.0
# Longer than TorchServe needs from its choice of a version to the worker's first call.
CALM_POLLS = 10
DRAIN_S = 600.0
ACCEPTED = range(200, 300)


class RolloutError(Exception):
    """The old version goes on serving; the message says why the new one does not."""


def archive_version(archive: Path) -> str:
    """The version that an archive was packed with. Raises RolloutError."""
    try:
        with zipfile.ZipFile(archive) as file:
            return str(json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise RolloutError(f"{archive} is no archive with a version: make it with `make mar VERSION=...`") from error


class Manager:
    """The management API of one server.

    Args:
        run: the run directory of a server that `serve` started.
        port: its inference port.
    """

    def __init__(self, run: RunDir, port: int) -> None:
        self.run = run
        self.ports = Ports(port)
        self.token = run.token("management")
        record = run.read_record()
        self.host = asked_address(record.host if record else HOST)

    def send(self, method: str, path: str, timeout_s: float = 120) -> Any:
        """One call that must succeed. Raises RolloutError with TorchServe's own message."""
        url = url_of(LOOPBACK, self.ports.management, f"/models{path}")
        try:
            status, reply = request_json(url, timeout_s=timeout_s, token=self.token, method=method)
        except Unreachable as error:
            raise RolloutError(f"no reply from the management port {self.ports.management}: {error}") from None
        if status not in ACCEPTED:
            message = reply.get("message") if isinstance(reply, dict) else reply
            raise RolloutError(f"TorchServe refuses {method} {path}: {status} {message}")
        return reply

    def version(self, name: str, version: str) -> management.Version | None:
        """One version as it is now; None where it is not registered. Raises RolloutError."""
        try:
            return next(iter(management.versions_of(self.ports, name, self.token, version)), None)
        except Unreachable as error:
            raise RolloutError(f"no answer from the management port {self.ports.management}: {error}") from None

    def default_version(self, name: str) -> str:
        """Raises RolloutError where the model is not served."""
        return str(self.send("GET", f"/{name}")[0]["modelVersion"])

    def register(self, archive: Path, name: str) -> None:
        """Starts a version's worker and returns at once. TorchServe reads the archive from its model store."""
        self.send("POST", f"?url={archive.name}&model_name={name}&initial_workers=1&synchronous=false")

    def wait_until_ready(self, name: str, version: str, timeout_s: float) -> None:
        """Returns when the version has given a token. Raises RolloutError with the worker's own error."""
        tail, lines, deadline = LogTail(self.run.model_log), list[str](), time.monotonic() + timeout_s
        tail.skip()
        while True:
            found = self.version(name, version)
            if found is not None and found.is_ready:
                break
            lines += [line for line in tail.new_lines() if f"-{name}_{version}-" in line]
            if find_error(lines):
                raise RolloutError(f"version {version} cannot be loaded: {find_error(lines)}")
            if time.monotonic() > deadline:
                raise RolloutError(f"version {version} is not ready after {timeout_s:.0f} s")
            time.sleep(server.POLL_S)
        answer = health.check(self.ports, f"{name}/{version}", self.run.key_file, 60, self.host)
        if answer.state is not health.State.READY:
            raise RolloutError(f"version {version} is loaded, but {answer.line()}")

    def requests_left(self, name: str, version: str) -> int | None:
        """None where the management port does not say it now."""
        try:
            found = self.version(name, version)
        except RolloutError:
            return None
        return drain.requests_left(self.run, found) if found else 0


def roll_out(
    manager: Manager, name: str, archive: Path, on_stage: Callable[[str], None], drain_s: float = DRAIN_S
) -> int | None:
    """Replaces the default version by the archive's; returns the requests that were cut (0 unless `drain_s` passed,
    None where that is unknown).

    Raises RolloutError; the old version is then still the default, and the new one is gone again.
    """
    old, new = manager.default_version(name), archive_version(archive)
    if manager.version(name, new) is not None:
        raise RolloutError(f"version {new} of {name} is served already: pack another one with `make mar VERSION=...`")
    on_stage(f"loading version {new} beside {old}")
    manager.register(archive, name)
    try:
        manager.wait_until_ready(name, new, READY_S)
        on_stage(f"version {new} answers; it becomes the default")
        manager.send("PUT", f"/{name}/{new}/set-default")
    except RolloutError:
        manager.send("DELETE", f"/{name}/{new}")
        raise
    on_stage(f"waiting until version {old} has nothing left to do")
    left = drain.wait_until_calm(lambda: manager.requests_left(name, old), drain_s, CALM_POLLS)
    manager.send("DELETE", f"/{name}/{old}")
    return left


def main(
    run_dir: Path = typer.Option(..., help="folder of the server"),
    archive: Path = typer.Option(..., help="the new version's .mar, in the server's model store"),
    name: str = typer.Option(DEMO_MODEL, help="name of the served model"),
    port: int = typer.Option(8080, help="inference port"),
    drain_s: float = typer.Option(DRAIN_S, help="seconds that requests of the old version have to end"),
) -> None:
    """Replace the served version by the archive's without a failed request."""
    started_s, run = time.monotonic(), RunDir(run_dir.resolve())
    try:
        if not has_server(run):
            # The archive belongs to NAME: a server that has the port may serve another model.
            raise RolloutError(
                f"no server runs in {run.path}: {describe(list(running()))}; name MODEL, NAME or RUN_DIR"
            )
        left = roll_out(Manager(run, port), name, archive.resolve(), say, drain_s)
    except RolloutError as error:
        fail(str(error))
    say("; ".join(filter(None, [f"done after {time.monotonic() - started_s:.1f} s", drain.cut_text(left, drain_s)])))


if __name__ == "__main__":
    typer.run(main)
