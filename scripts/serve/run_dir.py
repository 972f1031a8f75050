"""The folder in which one TorchServe lives: its configuration, logs, temporary files and the record of what runs.

Everything that TorchServe would share with other servers on the host (pid file, sockets, logs) lies in here. Starts
and stops nothing (`server`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.common.addresses import LOOPBACK, is_free, is_ipv6, is_loopback, url_of
from scripts.common.paths import ROOT
from scripts.pack.request_size import MAX_RESPONSE_BYTES, max_request_bytes

LOG4J_TEMPLATE = ROOT / "configs" / "torchserve" / "log4j2.xml"
METRICS_CONFIG = ROOT / "configs" / "torchserve" / "metrics.yaml"
HOST = LOOPBACK
# A name for an IPv6 address: TorchServe takes none as it is, and Java reads the name from the run directory's file.
BIND_NAME, HOSTS_FILE = "dsserve.bind", "hosts"
RECORD = "server.json"
# 30 days; TorchServe's default of 60 minutes would lock everybody out within the hour.
TOKEN_MINUTES = 30 * 24 * 60
# The path of a Unix socket holds at most 107 bytes; TorchServe puts `.ts.sock.9000` into its temporary folder.
SOCKET_FOLDER_BYTES = 107 - len("/.ts.sock.00000")


@dataclass(frozen=True)
class Ports:
    """The six ports of one server, all derived from the first."""

    inference: int

    @property
    def management(self) -> int:
        return self.inference + 1

    @property
    def metrics(self) -> int:
        """The model's metrics, which rank 0 serves."""
        return self.inference + 2

    @property
    def server_metrics(self) -> int:
        """TorchServe's own metrics."""
        return self.inference + 3

    @property
    def grpc_inference(self) -> int:
        return self.inference + 5

    @property
    def grpc_management(self) -> int:
        return self.inference + 6

    def all(self) -> list[int]:
        http = [self.inference, self.management, self.metrics, self.server_metrics]
        return [*http, self.grpc_inference, self.grpc_management]

    def taken(self, host: str = HOST) -> list[int]:
        """Those on which something listens already; `host` is the address of inference and of the model's metrics.

        Raises AddressError for an address of another machine.
        """
        open_ports = (self.inference, self.metrics)
        return [port for port in self.all() if not is_free(port, host if port in open_ports else HOST)]


@dataclass(frozen=True)
class Record:
    """What `start` wrote down for `status`, `stop` and `logs`. `host` is the address that inference is bound to."""

    pid: int
    name: str
    port: int
    temp: str
    started_at_s: float
    host: str = HOST


@dataclass(frozen=True)
class RunDir:
    """One run directory. `path` must be absolute: it is also the mark by which the server's processes are known."""

    path: Path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def model_log(self) -> Path:
        return self.logs / "model_log.log"

    @property
    def server_log(self) -> Path:
        return self.logs / "ts_log.log"

    @property
    def console_log(self) -> Path:
        return self.logs / "console.log"

    @property
    def config_file(self) -> Path:
        return self.path / "config.properties"

    @property
    def hosts_file(self) -> Path:
        """The IPv6 address of a server that has one, for Java (`server_properties`)."""
        return self.path / HOSTS_FILE

    @property
    def log4j_file(self) -> Path:
        return self.path / "log4j2.xml"

    @property
    def metrics_notes(self) -> Path:
        """Ports of workers that wait for the metrics port (`dsserve.observability.metrics_server`)."""
        return self.path / "metrics"

    @property
    def drain_file(self) -> Path:
        """While it exists, rank 0 refuses new requests (`dsserve.worker.control`)."""
        return self.path / "drain"

    @property
    def live(self) -> Path:
        """One file a worker, named by its torchrun's pid: the number of requests that it answers now."""
        return self.path / "live"

    @property
    def bytecode(self) -> Path:
        """Compiled Python for the next starts, where it is kept nowhere else (`server.worker_environment`)."""
        return self.path / "bytecode"

    @property
    def key_file(self) -> Path:
        """TorchServe's tokens; absent where it asks for none."""
        return self.path / "key_file.json"

    def token(self, kind: str) -> str | None:
        """The `management`, `inference` or `API` token; None where the server asks for none."""
        return read_token(self.key_file, kind)

    def create(self, properties: dict[str, str]) -> Path:
        """Make the folder with empty logs and the configuration; return the (empty) temporary folder to use.

        What a server left that was killed goes, its temporary folder elsewhere too."""
        killed = self.read_record()
        if killed is not None:
            self.clear(killed)
        self._forget()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.config_file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
        self.hosts_file.unlink(missing_ok=True)
        shutil.copyfile(LOG4J_TEMPLATE, self.log4j_file)
        temp = self.path / "tmp"
        if len(str(temp).encode()) > SOCKET_FOLDER_BYTES:
            return Path(tempfile.mkdtemp(prefix="dsserve-"))
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        return temp

    def write_record(self, record: Record) -> None:
        (self.path / RECORD).write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")

    def read_record(self) -> Record | None:
        """The record of the server started last, or None."""
        try:
            return Record(**json.loads((self.path / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def clear(self, record: Record) -> None:
        """Remove what a stopped server leaves: sockets, unpacked archives, the record. Logs stay."""
        shutil.rmtree(record.temp, ignore_errors=True)
        shutil.rmtree(self.bytecode / record.temp.lstrip("/"), ignore_errors=True)  # each start unpacks elsewhere
        self._forget()
        (self.path / RECORD).unlink(missing_ok=True)

    def _forget(self) -> None:
        self.drain_file.unlink(missing_ok=True)
        self.key_file.unlink(missing_ok=True)
        shutil.rmtree(self.live, ignore_errors=True)
        shutil.rmtree(self.metrics_notes, ignore_errors=True)


def read_token(key_file: Path, kind: str) -> str | None:
    """A token out of TorchServe's key file; None where there is no file, or one that is being written."""
    try:
        return str(json.loads(key_file.read_text(encoding="utf-8"))[kind]["key"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def server_properties(
    ports: Ports, name: str, archive: Path, config: Mapping[str, Any], host: str = HOST, tokens: bool = True
) -> dict[str, str]:
    """config.properties for one model (`config` is its model-config.yaml), metrics for Prometheus.

    Management, TorchServe's metrics and gRPC listen on loopback. Inference does too, unless `host` is another address:
    then every call needs a token, unless `tokens` is False: for networks that only a balancer reaches.
    """
    properties = {
        "inference_address": url_of(BIND_NAME if is_ipv6(host) else host, ports.inference),
        "management_address": url_of(HOST, ports.management),
        "metrics_address": url_of(HOST, ports.server_metrics),
        "metrics_config": str(METRICS_CONFIG),
        "grpc_inference_address": HOST,
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_address": HOST,
        "grpc_management_port": str(ports.grpc_management),
        "model_store": str(archive.parent),
        "load_models": f"{name}={archive.name}",
        "disable_token_authorization": str(is_loopback(host) or not tokens).lower(),
        "max_request_size": str(max_request_bytes(config)),
        "max_response_size": str(MAX_RESPONSE_BYTES),
        "token_expiration_min": str(TOKEN_MINUTES),
        "enable_model_api": "true",  # rolling restarts register versions
        "allowed_urls": "file:///nowhere",  # out of the model store alone
        "disable_system_metrics": "true",  # the collector needs packages of its own on GPU hosts, and breaks there
        "metrics_mode": "prometheus",
        "vmargs": "-Xms64m -Xmx1g -XX:+UseSerialGC",  # the cores belong to the ranks
    }
    if config.get("deviceType") == "cpu":
        properties["number_of_gpu"] = "0"
    if is_ipv6(host):
        properties["vmargs"] += f" -Djdk.net.hosts.file={HOSTS_FILE}"  # the run directory is Java's own folder
    return properties
