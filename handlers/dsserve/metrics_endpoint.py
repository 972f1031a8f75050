"""Serves rank 0's metrics over HTTP, one address for all workers of a server.

During a rolling restart two workers live, and a server may serve several models: the first one has the address. A later
one listens on a free port of loopback, which it writes down in the server's run directory, and its numbers are shown
with the first one's. It takes the address over as soon as that is free. Counts nothing (`metrics`).

The format is always Prometheus's plain text: asked for OpenMetrics, as each Prometheus does first, prometheus_client
(0.26) writes `vllm_...` for `vllm:...`, and neither dashboards nor autoscalers would find a thing.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dsserve.control import RUN_DIR_VARIABLE

logger = logging.getLogger(__name__)

# `host:port`, set by the scripts; without it no metrics are served.
ADDRESS_VARIABLE = "DSSERVE_METRICS"
FOLDER = "metrics"
LOOPBACK = "127.0.0.1"
PLAIN = "text/plain;version=0.0.4"
RETRY_S = 1.0
# A client that sends no request so long is gone; more at once than any Prometheus opens are closed.
IDLE_S = 5.0
MOST_CONNECTIONS = 32
_SCRAPE_S = 1.0


class Workers(Collector):
    """The metrics of this worker and of those that wrote a port down, each family once."""

    def __init__(self, own: CollectorRegistry, folder: Path | None) -> None:
        self._own = own
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        families = {family.name: family for family in self._own.collect()}
        for text in self._others():
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples = [*known.samples, *family.samples]
        return families.values()

    def _others(self) -> Iterator[str]:
        for path in sorted(self._folder.glob("[0-9]*")) if self._folder else ():
            if path.name == str(os.getpid()):
                continue
            if not Path("/proc", path.name).exists():
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # it starts, or ends, just now
                yield _scrape(int(path.read_text()))


def _serve(host: str, port: int, registry: CollectorRegistry) -> WSGIServer:
    """Serves in threads of its own from now on. Raises OSError."""
    server, _ = start_http_server(port, host, registry)
    app: Any = server.get_app()

    def plain(environ: dict[str, Any], start_response: Any) -> Any:
        return app(environ | {"HTTP_ACCEPT": PLAIN}, start_response)

    server.set_app(plain)
    _bound(server)
    return server


def _bound(server: Any) -> None:
    """Connections that say nothing are ended, and more than a few at once are closed: each costs rank 0 a thread, and
    the port may be open to others."""

    class Handler(server.RequestHandlerClass):
        timeout = IDLE_S

        def handle(self) -> None:
            with contextlib.suppress(TimeoutError):
                super().handle()

    room = threading.BoundedSemaphore(MOST_CONNECTIONS)
    begin, work = server.process_request, server.process_request_thread

    def process_request(request: Any, client_address: Any) -> None:
        if room.acquire(blocking=False):
            begin(request, client_address)
        else:
            server.shutdown_request(request)

    def process_request_thread(request: Any, client_address: Any) -> None:
        try:
            work(request, client_address)
        finally:
            room.release()

    server.RequestHandlerClass = Handler
    server.process_request, server.process_request_thread = process_request, process_request_thread


def _scrape(port: int) -> str:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_SCRAPE_S)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


class MetricsEndpoint:
    """Keeps a worker's metrics reachable, in threads of its own.

    Args:
        host, port: the server's address for metrics.
        folder: where workers without the address write their ports down; None = this one is alone.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int, folder: Path | None) -> None:
        self._registry = registry
        self._address = (host, port)
        self._folder = folder
        self._private: WSGIServer | None = None

    @classmethod
    def from_env(cls, registry: CollectorRegistry) -> MetricsEndpoint | None:
        """None where the server was started without our scripts."""
        host, _, port = os.environ.get(ADDRESS_VARIABLE, "").rpartition(":")
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        if not port.isdecimal():
            return None
        return cls(registry, host, int(port), Path(run_dir, FOLDER) if run_dir else None)

    def start(self) -> None:
        """Serves at once if the address is free; returns in any case."""
        error = self._take_address()
        if error is not None:
            logger.info("[dsserve] metrics wait for %s:%d: %s", *self._address, error.strerror)
            threading.Thread(target=self._wait, name="dsserve-metrics", daemon=True).start()

    def _wait(self) -> None:
        with contextlib.suppress(OSError):  # without it this worker's numbers show when it has the address
            self._listen_privately()
        while self._take_address() is not None:
            time.sleep(RETRY_S)

    def _take_address(self) -> OSError | None:
        """Serves at the address; returns why not."""
        shown = CollectorRegistry()
        shown.register(Workers(self._registry, self._folder))
        try:
            _serve(*self._address, shown)
        except OSError as error:
            return error
        self._end_private()
        logger.info("[dsserve] metrics at http://%s:%d/metrics", *self._address)
        return None

    def _listen_privately(self) -> None:
        if self._folder is None:
            return
        self._private = _serve(LOOPBACK, 0, self._registry)
        self._folder.mkdir(exist_ok=True)
        self._note.write_text(str(self._private.server_port))

    def _end_private(self) -> None:
        if self._private is not None:
            self._note.unlink(missing_ok=True)
            self._private.shutdown()
            self._private.server_close()
            self._private = None

    @property
    def _note(self) -> Path:
        return (self._folder or Path()) / str(os.getpid())
