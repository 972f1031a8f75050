"""The worker's log lines: text or JSON, INFO of rank 0 and warnings of all, nothing per decode step.

TorchServe's worker writes every line of its root logger to stdout, where the frontend reads it; a line that begins with
`[METRICS]` is a metric there and stays as it is. No line of ours holds a user's text: ids, lengths, milliseconds.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime, timezone

# TorchServe 0.12 writes these for every call, that is for every token: its log would grow by kilobytes a step.
_PER_CALL_MESSAGES = ("Backend received inference at", "skip sending response at rank", "[METRICS]PredictionTime")
# A body that is not JSON or not UTF-8, which the handler answers with a 400: one line of it is enough, without the call
# stack.
_BAD_BODY = ("Failed json decoding of input data", "Failed utf-8 decoding of input data")
_METRIC = "[METRICS]"
_REQUEST = re.compile(r"\[dsserve\] (?P<id>[0-9a-fA-F-]{36})(?: \((?P<client>[A-Za-z0-9._-]{1,64})\))?: ")
_PACKAGE = "dsserve"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, rank, logger, message, and the ids of lines about a request."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if message.startswith(_METRIC):
            return message
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "rank": self._rank,
            "logger": record.name,
            "message": message,
        }
        request = _REQUEST.match(message)
        if request:
            line["request_id"] = request["id"]
            if request["client"]:
                line["client_request_id"] = request["client"]
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logs(rank: int, log_format: str) -> None:
    """Gives the root logger's handlers the format, and drops what TorchServe's worker writes on every call."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_worth_keeping)
        if log_format == "json":
            handler.setFormatter(JsonFormatter(rank))


def set_serving_level(rank: int, level: str) -> None:
    """From the end of the load on: rank 0 as configured, the other ranks warnings only."""
    logging.getLogger(_PACKAGE).setLevel(level.upper() if rank == 0 else logging.WARNING)


def _is_worth_keeping(record: logging.LogRecord) -> bool:
    if str(record.msg).startswith(_BAD_BODY):
        record.exc_info = record.exc_text = None
    return not str(record.msg).startswith(_PER_CALL_MESSAGES)
