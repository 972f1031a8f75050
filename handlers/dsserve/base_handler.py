"""`BaseDeepSpeedHandler`: the class that every handler here and every handler of a user's own inherits from.

Sets up what a tensor-parallel rank needs before it loads a model: rank, device, threads, process group. Does not
load a model; `get_ds_engine` shards one.
"""

from __future__ import annotations

import logging
from abc import ABC
from pathlib import Path
from typing import Any

import torch
from ts.context import Context
from ts.torch_handler.distributed.base_deepspeed_handler import BaseDeepSpeedHandler as TorchServeDeepSpeedHandler

from dsserve.distributed import RankInfo, init_process_group, prepare_environment, select_device
from dsserve.leftovers import own_temporary_folder, sweep
from dsserve.parents import Parents, die_with_parent
from dsserve.watchdog import Watchdog

# TorchServe 0.12 writes these for every call, that is for every token: its log would grow by kilobytes a step.
_PER_CALL_MESSAGES = ("Backend received inference at", "skip sending response at rank")
_PER_CALL_METRIC = "[METRICS]PredictionTime"


class BaseDeepSpeedHandler(TorchServeDeepSpeedHandler, ABC):
    """Base of handlers whose model is sharded by DeepSpeed over the ranks that torchrun started.

    Attributes:
        rank: this process among the ranks.
        device: the rank's device, an actual `torch.device`.
        model_dir: the folder into which TorchServe unpacked the archive.
        yaml_config: model-config.yaml as a dict.
        watchdog: ends this rank with its parents; `with self.watchdog.limit(seconds, what):` ends it also when a
            block takes too long.
    """

    rank: RankInfo
    device: torch.device
    model_dir: Path
    yaml_config: dict[str, Any]
    watchdog: Watchdog

    def initialize(self, ctx: Context) -> None:
        """Prepares the rank. Call it first in a handler's own `initialize`, then load the model on the CPU."""
        self.context = ctx
        self.yaml_config = ctx.model_yaml_config or {}
        self.model_dir = Path(ctx.system_properties["model_dir"])
        self.rank = RankInfo.from_env()
        die_with_parent()
        self.watchdog = Watchdog(self.rank.rank, Parents.now()).start()
        quiet_per_call_logs()
        self.device = select_device(self.yaml_config.get("deviceType"), self.rank)
        section = self.yaml_config.get("handler") or {}
        prepare_environment(self.device, self.rank, section.get("num_threads"))
        if self.rank.is_leader:
            sweep(own_temporary_folder())
        init_process_group(self.rank)


def quiet_per_call_logs() -> None:
    """Drops the lines that TorchServe's worker writes on every call and keeps all others."""

    def is_worth_keeping(record: logging.LogRecord) -> bool:
        message = str(record.msg)
        return not message.startswith((*_PER_CALL_MESSAGES, _PER_CALL_METRIC))

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_worth_keeping)
