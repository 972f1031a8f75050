"""`DeepSpeedHandler` as TorchServe's own loader loads it: one class, one rank, the real model, in process."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from ts.context import RequestProcessor
from ts.utils.util import list_classes_from_module

import deepspeed_handler
from dsserve.config.torchserve import TimeLimits
from dsserve.core.errors import LoadError
from dsserve.parallel.rank import RankInfo
from dsserve.worker.watchdog import Watchdog
from tests.support.contexts import make_context


def config(model_path: str, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "continuousBatching": True,
        "parallelType": "tp",
        "minWorkers": 1,
        "maxWorkers": 1,
        "deviceType": "cpu",
        "deepspeed": {"dtype": "fp32"},
        "handler": {"model_path": model_path, "max_model_len": 256, "warmup": False},
    }
    return {**base, **changes}


def test_torchserve_finds_exactly_one_class() -> None:
    assert list_classes_from_module(deepspeed_handler) == [deepspeed_handler.DeepSpeedHandler]


def call(handler: deepspeed_handler.DeepSpeedHandler, row: dict[str, Any], **headers: str) -> bytes:
    """Calls of the handler until the row is answered."""
    ctx = make_context(".", {})
    ctx.request_ids, text = {0: "a"}, b""
    while not text:
        ctx.request_processor = [RequestProcessor({"body": {"content-type": "application/json"}, **headers})]
        text, row = handler.handle([row], ctx)[0], {}
    return text


def test_one_rank_alone_generates_and_says_why_autotp_serves(smollm2: Path) -> None:
    handler = deepspeed_handler.DeepSpeedHandler()
    auto = {"dtype": "fp32", "replace_with_kernel_inject": "auto"}
    handler.initialize(make_context(smollm2, config(".", deepspeed=auto)))
    assert b"Paris" in call(handler, {"body": {"prompt": "The capital of France is", "max_new_tokens": 4}})
    engine = json.loads(call(handler, {}, url_path="v1/models"))["data"][0]["engine"]
    assert engine["name"] == "autotp" and "the kernels need a GPU" in engine["fallback"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"handler": {"model_path": "no/such/folder"}}, ["model_path", "no/such/folder"]),
        ({"handler": {"model_path": "empty"}}, ["model_path", "config.json"]),
        ({"handler": {"model_path": "unweighted"}}, ["model_path", "no weights"]),
        ({"handler": {"model_path": ".", "max_model_len": 9000}}, ["max_model_len", "9000", "8192"]),
        ({"handler": {"model_path": ".", "max_length": 50}}, ["max_length", "max_new_tokens"]),
        ({"deepspeed": {"config": "gone.json"}}, ["gone.json"]),
        ({"deepspeed": {"dtype": "fp32", "replace_with_kernel_inject": True}}, ["replace_with_kernel_inject", "false"]),
        ({"continuousBatching": False}, ["continuousBatching"]),
        ({"torchrun": {"nproc-per-node": 2}}, ["nproc-per-node", "tp_size", "deviceIds"]),
        ({"deviceType": "gpu"}, ["GPU", "deviceType"]),
        ({"responseTimeout": 60}, ["collective_timeout", "60 s", "5 s", "responseTimeout"]),
        ({"startupTimeout": "long"}, ["startupTimeout", "long"]),
    ],
)
def test_a_load_that_cannot_work_is_one_line_in_the_log(
    smollm2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: list[str]
) -> None:
    for item in smollm2.iterdir():
        (tmp_path / item.name).symlink_to(item)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unweighted").mkdir()
    (tmp_path / "unweighted" / "config.json").symlink_to(smollm2 / "config.json")
    with caplog.at_level(logging.ERROR), pytest.raises(LoadError):
        deepspeed_handler.DeepSpeedHandler().initialize(make_context(tmp_path, config(".", **changes)))
    lines = [record.getMessage() for record in caplog.records if "LoadError" in record.getMessage()]
    assert len(lines) == 1 and "\n" not in lines[0]
    for word in words:
        assert word in lines[0]


class Panic(BaseException):
    """As pyo3's for a panic of Rust: no Exception."""


@pytest.mark.parametrize(
    ("error", "ends"), [(RuntimeError, True), (Panic, True), (KeyboardInterrupt, False), (SystemExit, False)]
)
def test_an_engine_that_breaks_ends_the_rank(
    error: type[BaseException], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr("dsserve.worker.exit.os._exit", ended.append)
    monkeypatch.setattr("dsserve.worker.exit.logging.shutdown", lambda: None)
    handler = deepspeed_handler.DeepSpeedHandler()
    handler.rank = RankInfo(rank=1, local_rank=1, world_size=2, local_world_size=2)
    handler.watchdog, handler._limits = Watchdog(1), TimeLimits(1.0, 2.0, 3.0)

    class Broken:
        def follow(self) -> None:
            raise error("device is gone")

    handler._engine = Broken()  # type: ignore[assignment]
    with pytest.raises(error, match="device is gone"):
        handler.handle([{}], None)
    assert ended == [1] * ends
