"""What the worker's log lines look like, and which are written."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from dsserve.worker.logs import JsonFormatter, set_serving_level, set_up_logs
from scripts.serve.worker_log import find_error, find_stages

PREFIX = "2026-01-01T00:00:00,000 [INFO ] W-29500-m_1.0-stdout MODEL_LOG - "
ID = "0b7a1c1e-3f52-4f0e-9f6e-0123456789ab"


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("dsserve")
    level = logger.level
    yield logger
    logger.setLevel(level)


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("dsserve.x", logging.INFO, __file__, 1, message, args, None)


def test_a_json_line_has_the_request_id_and_no_line_break() -> None:
    line = JsonFormatter(1).format(record("[dsserve] %s: 5 new tokens,\n stop", ID))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "INFO",
        "rank": 1,
        "logger": "dsserve.x",
        "message": f"[dsserve] {ID}: 5 new tokens,\n stop",
        "request_id": ID,
    }
    assert "request_id" not in json.loads(JsonFormatter(0).format(record("[dsserve] rank 0: ready")))


def test_metrics_stay_what_the_frontend_parses() -> None:
    assert (
        JsonFormatter(0).format(record("[METRICS]Tokens.Count:1|#Level:Host")) == "[METRICS]Tokens.Count:1|#Level:Host"
    )


def test_the_scripts_read_json_lines_too() -> None:
    formatter = JsonFormatter(0)
    lines = [PREFIX + formatter.format(record(text)) for text in ("[dsserve] sharding", "[dsserve] LoadError: mend it")]
    assert find_stages(lines)[0] == "sharding"
    assert find_error(lines) == "mend it"


def test_lines_of_every_call_are_dropped_and_others_kept() -> None:
    root, kept = logging.getLogger(), list[str]()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(self.format(record))

    handler = Keep()
    root.addHandler(handler)
    try:
        set_up_logs(0, "text")
        for message in (
            "Backend received inference at: 1",
            "skip sending response at rank 1",
            "[METRICS]PredictionTime.ms:1",
        ):
            root.warning(message)
        root.warning("[METRICS]Own.Count:1")
        for kind in ("json", "utf-8"):
            root.warning(f"Failed {kind} decoding of input data", exc_info=ValueError("of a client"))
        root.warning("something else")
    finally:
        root.removeHandler(handler)
        for other in root.handlers:
            other.filters.clear()
    bodies = [f"Failed {kind} decoding of input data" for kind in ("json", "utf-8")]
    assert kept == ["[METRICS]Own.Count:1", *bodies, "something else"]


@pytest.mark.parametrize(
    ("rank", "level", "expected"), [(0, "info", "INFO"), (0, "error", "ERROR"), (1, "debug", "WARNING")]
)
def test_levels_per_rank(package_logger: logging.Logger, rank: int, level: str, expected: str) -> None:
    set_serving_level(rank, level)
    assert logging.getLevelName(package_logger.level) == expected
