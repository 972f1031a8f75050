"""HAProxy with configs/haproxy/haproxy.cfg in front of some servers: check the file, run it, look into it, take servers
out and back in. Installs nothing; the configuration says everything about routing.
"""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.common.addresses import is_free
from scripts.common.paths import ROOT
from scripts.serve.run_dir import HOST

CONFIG = ROOT / "configs" / "haproxy" / "haproxy.cfg"
START_TIMEOUT_S = 10.0
POLL_S = 0.05
VALID = "Configuration file is valid"
OURS = "DSSERVE_"


class BalancerError(Exception):
    """HAProxy is missing, or did not do what was asked; the message says what to do."""


def find_haproxy() -> str:
    """Path of the program (Debian keeps it in /usr/sbin). Raises BalancerError."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BalancerError("haproxy is not installed: apt-get install haproxy (2.6 or newer)")
    return found


def environment(model: str, servers: Sequence[str], **settings: str) -> dict[str, str]:
    """The process's environment with what haproxy.cfg reads; `settings` are its variables without `DSSERVE_`."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    named = {f"SERVER_{number}": address for number, address in enumerate(servers, 1)}
    return base | {OURS + name: value for name, value in ({"MODEL": model} | named | settings).items()}


def lint(environ: dict[str, str]) -> str:
    """What `haproxy -c` says against the configuration; empty if it finds nothing. Raises BalancerError."""
    command = [find_haproxy(), "-c", "-f", str(CONFIG)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    return "" if done.returncode == 0 and said == VALID else said


@dataclass(frozen=True)
class Balancer:
    """A running HAProxy. `admin` is the socket of its runtime API."""

    port: int
    admin: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def command(self, line: str) -> str:
        """What the runtime API answers. Raises OSError."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.admin))
            connection.sendall(line.encode() + b"\n")
            pieces = []
            while piece := connection.recv(65536):
                pieces.append(piece)
        return b"".join(pieces).decode()

    def servers(self) -> dict[str, dict[str, str]]:
        """`show stat` of each server by its name (s1, ...): `status`, `scur` open requests, `stot` requests so far."""
        lines = self.command("show stat").removeprefix("# ").strip().splitlines()
        rows = csv.DictReader(lines)
        return {row["svname"]: row for row in rows if row["pxname"] == "servers" and row["svname"] != "BACKEND"}

    def is_up(self, name: str) -> bool:
        """Whether new requests go to it."""
        return self.servers()[name]["status"].startswith("UP")

    def wait_until(self, name: str, up: bool, timeout_s: float) -> float:
        """Seconds until the server is (not) up. Raises BalancerError after `timeout_s`."""
        started = time.monotonic()
        while self.is_up(name) is not up:
            if time.monotonic() - started > timeout_s:
                raise BalancerError(f"{name} is {self.servers()[name]['status']} after {timeout_s:.0f} s")
            time.sleep(POLL_S)
        return time.monotonic() - started

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Take a server out (no new requests, open ones go on) or back in."""
        self.command(f"set server servers/{name} state {'ready' if enabled else 'maint'}")


@contextmanager
def running(folder: Path, port: int, model: str, servers: Sequence[str], **settings: str) -> Iterator[Balancer]:
    """HAProxy on HOST:`port` while the block runs; its log is `folder`/haproxy.log. Raises BalancerError."""
    admin = folder / "haproxy.sock"
    settings = {"BIND": f"{HOST}:{port}", "STATS": f"{HOST}:{port + 1}", "ADMIN": str(admin)} | settings
    with (folder / "haproxy.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [find_haproxy(), "-db", "-f", str(CONFIG)], env=environment(model, servers, **settings),
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while is_free(port) or not admin.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                said = (folder / "haproxy.log").read_text(encoding="utf-8").strip()
                raise BalancerError(f"HAProxy did not start: {said or 'no message'}")
            time.sleep(POLL_S)
        yield Balancer(port, admin)
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)
