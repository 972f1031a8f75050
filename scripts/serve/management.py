"""TorchServe's management API as far as the scripts need it: is the model's worker ready?

`/ping` is no substitute: it says Healthy while a worker loads or dies again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scripts.common.addresses import LOOPBACK, url_of
from scripts.common.web import OK, Unreachable, request_json
from scripts.serve.run_dir import Ports

READY = "READY"
NOT_FOUND = 404


@dataclass(frozen=True)
class Version:
    """One version of a model that TorchServe has, with its one worker if there is one."""

    name: str
    version: str
    waiting: int
    worker: dict[str, Any] | None

    @property
    def is_ready(self) -> bool:
        return self.worker is not None and self.worker.get("status") == READY


def versions_of(ports: Ports, name: str, token: str | None = None, version: str = "all") -> list[Version]:
    """All versions of a model, or one. Empty for a model that is not there. Raises Unreachable."""
    status, found = request_json(_url(ports, f"/{name}/{version}"), token=token)
    if status == NOT_FOUND:
        return []
    if status != OK or not isinstance(found, list):
        raise Unreachable(f"status {status} for the versions of {name}")
    return [
        Version(
            str(item["modelName"]),
            str(item["modelVersion"]),
            int((item.get("jobQueueStatus") or {}).get("pendingRequests", 0)),
            (item.get("workers") or [None])[0],
        )
        for item in found
    ]


def all_versions(ports: Ports, token: str | None = None) -> Iterator[Version]:
    """Every version of every model. Raises Unreachable."""
    status, reply = request_json(_url(ports, "?limit=1000"), token=token)
    if status != OK or not isinstance(reply, dict):
        raise Unreachable(f"status {status} for the list of models")
    for item in reply.get("models", []):
        yield from versions_of(ports, item["modelName"], token)


def worker_of(ports: Ports, name: str, token: str | None = None) -> dict[str, Any] | None:
    """The default version's worker as TorchServe describes it (`status`, `pid`); None while there is none to be had."""
    try:
        status, models = request_json(_url(ports, f"/{name}"), token=token)
    except Unreachable:
        return None
    workers = models[0].get("workers") if status == OK and isinstance(models, list) and models else None
    return workers[0] if workers else None


def is_ready(ports: Ports, name: str, token: str | None = None) -> bool:
    """Whether the model's default version answers requests now."""
    worker = worker_of(ports, name, token)
    return worker is not None and worker.get("status") == READY


def _url(ports: Ports, path: str) -> str:
    """The management port listens on loopback alone, wherever inference does."""
    return url_of(LOOPBACK, ports.management, f"/models{path}")
