"""Is the model served? Asks TorchServe for the worker's state, and the engine itself for one token.

`/ping` is no substitute: it says Healthy while a model loads and after it died. Exit codes: 0 ready; 1 not now
(loading, restarting, draining, full); 2 dead: TorchServe does not answer, or has no such model. A readiness probe takes
0 alone; a liveness probe (`--live`) takes everything but 2, since TorchServe restarts a worker by itself.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

import typer

from scripts.common.addresses import LOOPBACK, AddressError, url_of
from scripts.common.console import fail, say
from scripts.common.paths import DEMO_MODEL
from scripts.common.web import OK, Unreachable, request_json
from scripts.serve import management
from scripts.serve.ask import error_of
from scripts.serve.find_run import find_target
from scripts.serve.run_dir import HOST, Ports, read_token

CANARY = {"prompt": "Hello", "max_new_tokens": 1}
TIMEOUT_S = 10.0


class State(IntEnum):
    """What a probe's exit code says."""

    READY = 0
    NOT_READY = 1
    DEAD = 2


@dataclass(frozen=True)
class Health:
    """What was found. `canary_ms` is the time of one token through the engine, None where none came."""

    state: State
    detail: str
    canary_ms: float | None = None

    def line(self) -> str:
        took = "" if self.canary_ms is None else f" (one token in {self.canary_ms:.0f} ms)"
        return f"{self.state.name.lower().replace('_', ' ')}: {self.detail}{took}"

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "state": self.state.name.lower()})


def check(
    ports: Ports, name: str, key_file: Path | None = None, timeout_s: float = TIMEOUT_S, host: str = HOST
) -> Health:
    """Looks once; takes `timeout_s` at most, and never raises for a server that is not well.

    Args:
        host: the address that a client on this machine asks for inference; management is asked on loopback.
    """
    deadline = time.monotonic() + timeout_s
    token = read_token(key_file, "management") if key_file else None
    url = url_of(LOOPBACK, ports.management, f"/models/{name}")
    try:
        status, _ = request_json(url, timeout_s=timeout_s, token=token)
    except Unreachable as error:
        return Health(State.DEAD, f"no reply from the management port {ports.management}: {error}")
    if status != OK:
        return Health(State.DEAD, f"status {status} from {url}")
    worker = management.worker_of(ports, name, token)
    if worker is None or worker.get("status") != management.READY:
        return Health(State.NOT_READY, f"the worker is {(worker or {}).get('status', 'missing')}")
    inference = url_of(host, ports.inference, f"/predictions/{name}")
    return _ask(inference, name, read_token(key_file, "inference") if key_file else None, deadline)


def _ask(url: str, name: str, token: str | None, deadline: float) -> Health:
    started = time.monotonic()
    try:
        status, reply = request_json(url, CANARY, max(0.1, deadline - started), token)
    except Unreachable as error:
        return Health(State.NOT_READY, f"the worker is READY, and gave no token: {error}")
    if status == OK:
        return Health(State.READY, f"{name} answers", round((time.monotonic() - started) * 1e3, 1))
    return Health(State.NOT_READY, f"status {status}: {error_of(reply).get('message', 'no reason given')}")


def main(
    name: str = typer.Option(DEMO_MODEL, help="name of the served model"),
    port: int = typer.Option(8080, help="inference port"),
    host: str = typer.Option(HOST, help="address that inference is bound to, where no record says it"),
    run_dir: Path = typer.Option(None, help="folder of the server: its record says address and tokens"),
    key_file: Path = typer.Option(None, help="TorchServe's key_file.json, where it asks for tokens"),
    timeout_s: float = typer.Option(TIMEOUT_S, help="longest time of the whole probe"),
    live: bool = typer.Option(False, "--live", help="liveness: exit code 0 for everything that is not dead"),
    as_json: bool = typer.Option(False, "--json", help="one JSON line on stdout"),
) -> None:
    """Exit code 0 if the model answers now, 1 if not, 2 if the server is dead."""
    try:
        target = find_target(name, port, run_dir, host, key_file)
    except AddressError as error:
        fail(str(error))
    health = check(target.ports, target.name, target.key_file, timeout_s, target.host)
    if as_json:
        typer.echo(health.to_json())
    else:
        say(health.line())
    failed = health.state is State.DEAD if live else health.state is not State.READY
    raise typer.Exit(code=int(health.state) if failed else 0)


if __name__ == "__main__":
    typer.run(main)
