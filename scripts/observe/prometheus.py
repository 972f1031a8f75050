"""Prometheus with configs/prometheus for some servers: run it, and ask it over its HTTP API.

The configuration and the alerts are the project's own; only the targets are put in, and a shorter interval if asked.
Installs nothing, and keeps nothing: what it stored goes with its folder.
"""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.common import web
from scripts.common.paths import ROOT
from scripts.serve.run_dir import HOST, Ports

FOLDER = ROOT / "configs" / "prometheus"
CONFIG, RULES = FOLDER / "prometheus.yml", FOLDER / "alerts.yml"
START_TIMEOUT_S = 20.0
POLL_S = 0.1


class PrometheusError(Exception):
    """Prometheus is missing, did not start, or refused a query; the message says what to do."""


def find(program: str = "prometheus") -> str:
    """Path of prometheus or promtool. Raises PrometheusError."""
    found = shutil.which(program)
    if found is None:
        raise PrometheusError(f"{program} is not installed (Debian and Ubuntu: apt-get install prometheus)")
    return found


def configuration(
    servers: Sequence[Ports], scrape_s: int | None = None, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """prometheus.yml with these servers as targets; `labels` are put to all their series."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    if scrape_s is not None:
        config["global"] = {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"}
    ports = {
        "dsserve": [server.metrics for server in servers],
        "torchserve": [server.server_metrics for server in servers],
    }
    for job in config["scrape_configs"]:
        targets = [f"{HOST}:{port}" for port in ports[job["job_name"]]]
        job["static_configs"] = [{"targets": targets, "labels": dict(labels or {})}]
    return config


@dataclass(frozen=True)
class Series:
    """One series of an answer: its labels, and (Unix time, value) of each sample; NaN is a value."""

    labels: Mapping[str, str]
    samples: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """`data` of an answer of its API. Raises PrometheusError."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            status, reply = web.request_json(address, timeout_s=30)
        except web.Unreachable as error:
            raise PrometheusError(f"no answer of {self.url}: {error}") from None
        if status != web.OK:
            raise PrometheusError(f"{path}: {reply['error'] if isinstance(reply, dict) else reply}")
        return reply["data"]

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        try:
            return web.request_json(f"{self.url}/-/ready")[0] == web.OK
        except web.Unreachable:
            return False

    def query(self, promql: str) -> list[Series]:
        """The value of each series now."""
        result = self.get("query", query=promql)["result"]
        return [Series(found["metric"], [read(found["value"])]) for found in result]

    def query_range(self, promql: str, start: float, end: float, step_s: float) -> list[Series]:
        """The values of each series from `start` to `end`, Unix time."""
        result = self.get("query_range", query=promql, start=start, end=end, step=step_s)["result"]
        return [Series(found["metric"], [read(sample) for sample in found["values"]]) for found in result]

    def names(self, selector: str) -> set[str]:
        """Names of all series that it selects."""
        return {labels["__name__"] for labels in self.get("series", **{"match[]": selector})}

    def wait_for(self, promql: str, timeout_s: float) -> list[Series]:
        """What the query gives as soon as it gives anything. Raises PrometheusError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.query(promql)):
            if time.monotonic() > deadline:
                raise PrometheusError(f"nothing after {timeout_s:.0f} s: {promql}")
            time.sleep(POLL_S)
        return found


def read(sample: Sequence[Any]) -> tuple[float, float]:
    return float(sample[0]), float(sample[1])


@contextmanager
def running(folder: Path, port: int, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Prometheus on HOST:`port` while the block runs; its data and log lie in `folder`. Raises PrometheusError."""
    folder.mkdir(exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    shutil.copy(RULES, folder)
    command = [find(), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={HOST}:{port}"], stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    found = Prometheus(f"http://{HOST}:{port}")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not found.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = (folder / "prometheus.log").read_text(encoding="utf-8").strip()
                raise PrometheusError(f"Prometheus did not start: {said[-500:] or 'no message'}")
            time.sleep(POLL_S)
        yield found
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)
