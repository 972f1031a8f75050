"""Start, watch and stop one TorchServe in a run directory of its own.

Ports, logs, sockets and temporary files are the server's own, so several can run on one machine. Only processes that
carry the mark of the run directory are ever ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from scripts.common.addresses import LOOPBACK, AddressError, is_ipv6, resolve, url_of
from scripts.common.machine import find_java_home
from scripts.serve import drain, management, processes
from scripts.serve.run_dir import BIND_NAME, HOST, Ports, Record, RunDir, server_properties
from scripts.serve.worker_log import LogTail, find_error, find_stages

START_TIMEOUT_S = 300.0
STOP_GRACE_S = 20.0
POLL_S = 0.2
UNKNOWN_PID = 0  # of a server that is being started
METRICS_VARIABLE = "DSSERVE_METRICS"  # `dsserve.observability.metrics_server` reads it
TRACEBACK_S = 1.0  # the announcement of a worker's death comes before the traceback


class ServerError(Exception):
    """The server could not be started or is not there; the message says why and what to do."""


def read_archive(archive: Path) -> dict[str, Any]:
    """model-config.yaml inside a .mar. Raises ServerError."""
    try:
        with zipfile.ZipFile(archive) as file:
            manifest = json.loads(file.read("MAR-INF/MANIFEST.json"))
            return dict(yaml.safe_load(file.read(manifest["model"]["configFile"])))
    except FileNotFoundError:
        raise ServerError(f"{archive} does not exist: make it with `make mar`") from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ServerError(f"{archive} is no archive with a model-config.yaml: {error}") from None


def worker_environment(run: RunDir, temp: Path, config: dict[str, Any]) -> dict[str, str]:
    """Environment of TorchServe, which its workers inherit. Raises MachineError where there is no Java."""
    environ = {**os.environ, processes.MARK: str(run.path)}
    environ.pop("TS_CONFIG_FILE", None)  # it would win over our configuration
    environ |= {"TEMP": str(temp), "TMPDIR": str(temp)}
    environ |= {"LOG_LOCATION": str(run.logs), "METRICS_LOCATION": str(run.logs)}
    # TorchServe looks for torchrun on PATH: it must be the one beside this Python.
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
    java_home = find_java_home(environ)
    if java_home:
        environ["JAVA_HOME"] = java_home
    if config.get("deviceType") == "cpu":
        environ["DS_ACCELERATOR"] = "cpu"
    if Path((config.get("handler") or {}).get("model_path", "")).is_absolute():
        environ["HF_HUB_OFFLINE"] = "1"
    if _compiles_at_each_start(environ):
        del environ["PYTHONDONTWRITEBYTECODE"]
        environ.setdefault("PYTHONPYCACHEPREFIX", str(run.bytecode))
    return environ


def _compiles_at_each_start(environ: dict[str, str]) -> bool:
    """Whether each process would compile torch again: Python may write no bytecode, as images for containers often have
    it, and there is none (uv installs packages without)."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or not environ.get("PYTHONDONTWRITEBYTECODE"):
        return False
    return not Path(importlib.util.cache_from_source(found.origin)).is_file()


def start(run: RunDir, name: str, archive: Path, ports: Ports, host: str = HOST, tokens: bool = True) -> Record:
    """Start TorchServe in the background and return at once; a start that is interrupted ends what it started.

    Raises ServerError, MachineError.
    """
    if processes.find_marked(run.path):
        raise ServerError(f"a server runs already in {run.path}: end it with `make stop`, or look with `make status`")
    try:
        host = resolve(host)
        taken = ports.taken(host)
    except AddressError as error:
        raise ServerError(str(error)) from None
    if taken:
        raise ServerError(
            f"port {', '.join(map(str, taken))} is in use (needed: {', '.join(map(str, ports.all()))}): "
            "choose another PORT, or stop the program that listens there"
        )
    config = read_archive(archive)
    temp = run.create(server_properties(ports, name, archive, config, host, tokens))
    environ = worker_environment(run, temp, config) | {METRICS_VARIABLE: f"{host}:{ports.metrics}"}
    if is_ipv6(host):
        run.hosts_file.write_text(f"{host} {BIND_NAME}\n", encoding="utf-8")
    record = Record(UNKNOWN_PID, name, ports.inference, str(temp), time.time(), host)
    run.write_record(record)  # first: whoever ends us, `stop` finds what there is
    try:
        record = replace(record, pid=_launch(run, temp, environ))
        run.write_record(record)
    except BaseException:
        processes.end_all(run.path, STOP_GRACE_S)
        run.clear(record)
        raise
    return record


def _launch(run: RunDir, temp: Path, environ: dict[str, str]) -> int:
    """TorchServe's pid. Raises ServerError."""
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs"]
    command += ["--ts-config", str(run.config_file), "--log-config", str(run.log4j_file)]
    with run.console_log.open("wb") as console:
        # A session of its own: the server outlives this command and its terminal.
        launched = subprocess.run(
            command, cwd=run.path, env=environ, stdin=subprocess.DEVNULL,
            stdout=console, stderr=subprocess.STDOUT, start_new_session=True, check=False,
        )  # fmt: skip
    pid_file = temp / ".model_server.pid"
    if launched.returncode != 0 or not pid_file.is_file():
        raise ServerError(f"TorchServe did not start: {last_line(run.console_log)}")
    return int(pid_file.read_text())


def wait_until_ready(
    run: RunDir, record: Record, on_stage: Callable[[str], None], timeout_s: float = START_TIMEOUT_S
) -> None:
    """Return when the model answers; call `on_stage` with each stage the worker announces.

    Raises ServerError with the worker's own error as soon as it dies, or when `timeout_s` is over. Stops nothing.
    """
    ports, tail, lines = Ports(record.port), LogTail(run.model_log), list[str]()
    deadline = time.monotonic() + timeout_s
    while not management.is_ready(ports, record.name, run.token("management")):
        new = tail.new_lines()
        lines += new
        for stage in find_stages(new):
            on_stage(stage)
        if find_error(lines):
            time.sleep(TRACEBACK_S)
            raise ServerError(f"the model could not be loaded: {find_error(lines + tail.new_lines())}")
        if not is_alive(run, record):
            raise ServerError(f"TorchServe ended: {last_line(run.server_log) or last_line(run.console_log)}")
        if time.monotonic() > deadline:
            raise ServerError(
                f"not ready after {timeout_s:.0f} s (last stage: {(find_stages(lines) or ['none'])[-1]}); "
                f"last error of TorchServe: {last_line(run.server_log, 'ERROR') or 'none'}"
            )
        time.sleep(POLL_S)
    for stage in find_stages(tail.new_lines()):
        on_stage(stage)


def is_alive(run: RunDir, record: Record) -> bool:
    """Whether TorchServe itself runs, and its number was not given to another process since."""
    try:
        process = psutil.Process(record.pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(processes.MARK) == str(run.path)
    except psutil.Error:
        return False


def stop(
    run: RunDir,
    drain_s: float = 0.0,
    is_over: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
) -> int | None:
    """End the server and all its workers. None if none ran, else how many processes had to be killed.

    Running requests have `drain_s` seconds to end, unless this is the second `stop`, or `is_over` says so. `tell` hears
    of those that had not ended then.
    """
    record = run.read_record()
    if record is None and not processes.find_marked(run.path):
        return None
    if record is not None and drain_s > 0 and is_alive(run, record) and drain.raise_flag(run):
        left = drain.drain(run, Ports(record.port), drain_s, lambda: is_over() or not is_alive(run, record))
        if left != 0:
            tell(drain.cut_text(left, drain_s))
    killed = processes.end_all(run.path, STOP_GRACE_S)
    if record is not None:
        run.clear(record)
    return killed


def status(run: RunDir) -> list[str]:
    """Lines for people: model, ports, processes, uptime."""
    record, found = run.read_record(), processes.find_marked(run.path)
    if record is None or not found:
        left = f" ({len(found)} processes are left: `make stop` ends them)" if found else ""
        return [f"no server runs in {run.path}{left}"]
    ports = Ports(record.port)
    worker = management.worker_of(ports, record.name, run.token("management"))
    draining = ", draining: new requests are refused" if run.drain_file.exists() else ""
    return [
        f"model       {record.name}: {worker['status'] if worker else 'no worker'}{draining}",
        f"inference   {url_of(record.host, ports.inference)}/predictions/{record.name}",
        f"management  {url_of(LOOPBACK, ports.management)}/models/{record.name}",
        f"metrics     {url_of(record.host, ports.metrics)}/metrics",
        f"TorchServe  {url_of(LOOPBACK, ports.server_metrics)}/metrics",
        f"processes   {', '.join(f'{processes.describe(item)} {item.pid}' for item in found)}",
        f"up for      {(time.time() - record.started_at_s) / 60:.1f} minutes",
        f"logs        {run.logs}",
    ]


def last_line(path: Path, containing: str = "") -> str:
    """Last non-empty line of a file that contains the text; empty if there is none."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip() and containing in line), "")
