"""Which server a command means: that of the run directory it names, else the one below run/ that has the port.

A served name and a run directory follow from MODEL: who names the port alone finds its server here too. Looks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.common.addresses import asked_address, url_of
from scripts.common.paths import ROOT
from scripts.serve import processes
from scripts.serve.run_dir import HOST, Ports, Record, RunDir, read_token

RUNS = ROOT / "run"


class NotFound(Exception):
    """No server is what was meant; the message names those that run."""


class Ambiguous(NotFound):
    """Several servers could be meant; the message names them."""


@dataclass(frozen=True)
class Target:
    """A served model as clients on this machine ask for it."""

    name: str
    ports: Ports
    host: str = HOST
    key_file: Path | None = None

    @property
    def url(self) -> str:
        return url_of(self.host, self.ports.inference, f"/predictions/{self.name}")

    def token(self, kind: str) -> str | None:
        return read_token(self.key_file, kind) if self.key_file else None


def has_server(run: RunDir) -> bool:
    """Whether anything of a server is there: its processes, or the record that one left."""
    return run.read_record() is not None or bool(processes.find_marked(run.path))


def running(runs: Path | None = None) -> Iterator[tuple[RunDir, Record]]:
    """Servers whose processes live, with their records."""
    folder_of_runs = runs or RUNS
    for folder in sorted(folder_of_runs.iterdir()) if folder_of_runs.is_dir() else ():
        run = RunDir(folder.resolve())
        record = run.read_record()
        if record is not None and processes.find_marked(run.path):
            yield run, record


def describe(servers: list[tuple[RunDir, Record]]) -> str:
    """One clause that names them."""
    found = [f"{record.name} at {record.host} port {record.port} (RUN_DIR={run.path})" for run, record in servers]
    return f"these run: {'; '.join(found)}" if found else "none runs"


def find_run(run_dir: Path, port: int | None, runs: Path | None = None) -> RunDir:
    """The run directory that is meant. Raises NotFound."""
    named = RunDir(run_dir.resolve())
    if has_server(named):
        return named
    servers = list(running(runs))
    there = [run for run, record in servers if record.port == port]
    if len(there) == 1:
        return there[0]
    if there:
        raise Ambiguous(f"several servers have port {port}, name one by RUN_DIR: {describe(servers)}")
    raise NotFound(f"no server runs in {run_dir}{f' or at port {port}' if port else ''}: {describe(servers)}")


def find_target(
    name: str, port: int, run_dir: Path | None, host: str, key_file: Path | None = None, runs: Path | None = None
) -> Target:
    """The model that a client asks: what the server's record says, where there is one; else what was given.

    Raises AddressError.
    """
    try:
        run = find_run(run_dir, port, runs) if run_dir else None
    except NotFound:
        run = None
    record = run.read_record() if run else None
    if run is None or record is None:
        return Target(name, Ports(port), asked_address(host), key_file)
    named = run_dir is not None and run.path == run_dir.resolve()
    return Target(name if named else record.name, Ports(record.port), asked_address(record.host), run.key_file)
