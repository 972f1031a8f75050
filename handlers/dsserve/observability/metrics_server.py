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
import io
import logging
import os
import socket
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

from dsserve.core.environment import RUN_DIR_VARIABLE

logger = logging.getLogger(__name__)

# `host:port`, set by the scripts; without it no metrics are served.
ADDRESS_VARIABLE = "DSSERVE_METRICS"
FOLDER = "metrics"
LOOPBACK = "127.0.0.1"
PLAIN = "text/plain;version=0.0.4"
RETRY_S = 1.0
# A connection costs rank 0 a thread, and the port may be open to others. One that sends or takes nothing so long ends,
# and so does one of that age. More at once than any Prometheus opens: the oldest ends for the next one.
IDLE_S = 5.0
LONGEST_S = 10.0
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


class Connections:
    """Bounds the open connections of a server: their number, their age, and how long each read and write may take.

    Args:
        server: one that serves each connection in a thread; some of its methods are replaced.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._lock = threading.Lock()
        self._opened: dict[socket.socket, float] = {}  # the oldest first; times of the monotonic clock
        self._begin, self._work = server.process_request, server.process_request_thread
        server.RequestHandlerClass = _patient(server.RequestHandlerClass)
        server.process_request, server.process_request_thread = self._accept, self._serve
        server.service_actions = self._end_old  # called twice a second, and after each new connection
        server.socket.listen(MOST_CONNECTIONS)  # of 5, its default, a sixth at the same moment waits for a second

    def _accept(self, connection: socket.socket, address: Any) -> None:
        """A newcomer has a place, if need be that of the oldest connection: who is slow does not keep others out."""
        if not self._room.acquire(blocking=False):
            self._end(self._older_than(0)[:1])
            if not self._room.acquire(timeout=IDLE_S):
                self._server.shutdown_request(connection)
                return
        with self._lock:
            self._opened[connection] = time.monotonic()
        self._begin(connection, address)

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            self._work(connection, address)
        finally:
            with self._lock:
                del self._opened[connection]
            self._room.release()

    def _end_old(self) -> None:
        self._end(self._older_than(LONGEST_S))

    def _older_than(self, seconds: float) -> list[socket.socket]:
        before = time.monotonic() - seconds
        with self._lock:
            return [connection for connection, opened in self._opened.items() if opened <= before]

    def _end(self, connections: list[socket.socket]) -> None:
        """Its thread closes a connection; from now on it neither reads nor writes, and so ends at once."""
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _patient(handler: Any) -> Any:
    """The request handler with time-outs. A client that is slow or gone is no error: nothing is logged of it."""

    class Writer(io.BufferedIOBase):
        def __init__(self, connection: socket.socket) -> None:
            self._connection = connection

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            try:
                self._connection.sendall(data)  # the time-out is for all of it
            except TimeoutError:
                raise ConnectionAbortedError from None  # which wsgiref takes for a client that left
            return len(data)

    class Handler(handler):
        timeout = IDLE_S

        def setup(self) -> None:
            super().setup()
            self.wfile = Writer(self.connection)

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

    return Handler


def _serve(host: str, port: int, registry: CollectorRegistry) -> WSGIServer:
    """Serves in threads of its own from now on. Raises OSError."""
    server, _ = start_http_server(port, host, registry)
    app: Any = server.get_app()

    def plain(environ: dict[str, Any], start_response: Any) -> Any:
        return app(environ | {"HTTP_ACCEPT": PLAIN}, start_response)

    server.set_app(plain)
    Connections(server)
    return server


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
        host, port = self._address
        logger.info("[dsserve] metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
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
