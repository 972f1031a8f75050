"""TorchServe's own keys of model-config.yaml that continuous batching over tensor-parallel ranks depends on.

Checks what would otherwise hang or lose requests without an error; reads nothing of `handler:` or `deepspeed:`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsserve.config import YAML_FILE
from dsserve.errors import LoadError

# Key -> the one value with which TorchServe 0.12 serves this handler, and what happens otherwise.
_REQUIRED = {
    "continuousBatching": (True, "without it a stream ends after its first frame"),
    "parallelType": ("tp", "without it only one rank is started or heard"),
    "maxWorkers": (1, "a second worker of one model stalls streams"),
    "minWorkers": (1, "a second worker of one model stalls streams"),
}


def check_server_settings(yaml_config: Mapping[str, Any] | None, batch_size: int | None, sequences: int) -> None:
    """Checks TorchServe's keys, and its `batchSize` against the sequences that run or wait.

    Args:
        batch_size: rows that TorchServe hands over in one call.
        sequences: `handler.max_running` + `handler.max_waiting`.

    Raises:
        LoadError: a key that is missing or has a value with which requests would be lost.
    """
    config = yaml_config or {}
    for key, (value, why) in _REQUIRED.items():
        if config.get(key) != value:
            wanted = str(value).lower()
            raise LoadError(f"{YAML_FILE}: set {key}: {wanted} (found {config.get(key)!r}): {why}")
    if config.get("asyncCommunication"):
        raise LoadError(f"{YAML_FILE}: asyncCommunication reaches rank 0 only; leave it out")
    if not batch_size or batch_size <= sequences:
        raise LoadError(
            f"{YAML_FILE}: batchSize {batch_size} is too small: handler.max_running + handler.max_waiting = "
            f"{sequences} requests are held, and one more must get through to be refused; set batchSize: "
            f"{sequences + 1} or more"
        )
