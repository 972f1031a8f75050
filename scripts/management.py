"""TorchServe's management API as far as the scripts need it: is the model's worker ready?

`/ping` is no substitute: it says Healthy while a worker loads or dies again and again.
"""

from __future__ import annotations

from typing import Any

from scripts.run_dir import HOST, Ports
from scripts.web import OK, Unreachable, request_json

READY = "READY"


def worker_of(ports: Ports, name: str) -> dict[str, Any] | None:
    """The model's worker as TorchServe describes it (`status`, `pid`, ...); None while there is none to be had."""
    try:
        status, models = request_json(f"http://{HOST}:{ports.management}/models/{name}")
    except Unreachable:
        return None
    workers = models[0].get("workers") if status == OK and isinstance(models, list) and models else None
    return workers[0] if workers else None


def is_ready(ports: Ports, name: str) -> bool:
    """Whether the model answers requests now."""
    worker = worker_of(ports, name)
    return worker is not None and worker.get("status") == READY
