"""TorchServe's own keys of model-config.yaml that continuous batching over tensor-parallel ranks depends on.

Checks what would otherwise hang or lose requests without an error; reads nothing of `handler:` or `deepspeed:`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsserve.config.handler import YAML_FILE
from dsserve.core.errors import LoadError

logger = logging.getLogger(__name__)

# Key -> the one value with which TorchServe 0.12 serves this handler, and what happens otherwise.
_REQUIRED = {
    "continuousBatching": (True, "without it a stream ends after its first frame"),
    "parallelType": ("tp", "without it only one rank is started or heard"),
    "maxWorkers": (1, "a second worker of one model stalls streams"),
    "minWorkers": (1, "a second worker of one model stalls streams"),
}


# Requests that wait for the worker's next call. TorchServe's own default, and what holds any burst.
_DEFAULT_QUEUE, ENOUGH_QUEUE = 100, 4096


def check_server_settings(yaml_config: Mapping[str, Any] | None, batch_size: int | None, sequences: int) -> None:
    """Checks TorchServe's keys, and its `batchSize` against the sequences that run or wait. Warns of a short queue.

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
    _check_queue(config.get("jobQueueSize", _DEFAULT_QUEUE))


def _check_queue(size: Any) -> None:
    """A request beyond TorchServe's queue never reaches the handler, which would say why it is refused and until when.

    Raises:
        LoadError: no size of a queue.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise LoadError(f"{YAML_FILE}: jobQueueSize must be a whole number above 0 (found {size!r:.80})")
    if size < ENOUGH_QUEUE and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "[dsserve] %s: jobQueueSize %d: in a burst of more, TorchServe answers 503 by itself, without Retry-After, "
            "where the handler would answer 429; set jobQueueSize: %d",
            YAML_FILE, size, ENOUGH_QUEUE,
        )  # fmt: skip


# TorchServe's own defaults of responseTimeout and startupTimeout.
_DEFAULT_TIMEOUT_S = 120
# The other ranks wait this much longer than rank 0: the death of any of them cuts all streams before rank 0 answers.
ANSWER_MARGIN_S = 5.0
# Of startupTimeout: our log line says where the load hangs, TorchServe's only that it does.
_LOAD_SHARE = 0.95


@dataclass(frozen=True)
class TimeLimits:
    """Seconds after which a rank gives up: rank 0 a call of its engine, every rank a call of the handler, the load."""

    engine_s: float
    call_s: float
    load_s: float


def read_time_limits(yaml_config: Mapping[str, Any] | None, collective_timeout_s: float) -> TimeLimits:
    """The limits that lie below TorchServe's own, so that a stalled worker is ended and answered by us.

    Raises:
        LoadError: `handler.collective_timeout` leaves TorchServe's `responseTimeout` no room.
    """
    config = yaml_config or {}
    response_s = config.get("responseTimeout", _DEFAULT_TIMEOUT_S)
    startup_s = config.get("startupTimeout", _DEFAULT_TIMEOUT_S)
    for key, value in (("responseTimeout", response_s), ("startupTimeout", startup_s)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise LoadError(f"{YAML_FILE}: {key} must be a number of seconds above 0 (found {value!r:.80})")
    call_s = collective_timeout_s + ANSWER_MARGIN_S
    if call_s >= response_s:
        raise LoadError(
            f"{YAML_FILE}: handler.collective_timeout ({collective_timeout_s:g} s) + {ANSWER_MARGIN_S:g} s must be "
            f"below responseTimeout ({response_s:g} s): lower the one or raise the other"
        )
    return TimeLimits(collective_timeout_s, call_s, startup_s * _LOAD_SHARE)
