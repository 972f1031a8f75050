"""`BaseDeepSpeedHandler`: the class that every handler here and every handler of a user's own inherits from.

Sets up what a tensor-parallel rank needs before it loads a model: rank, device, threads, process group. Does not
load a model; `get_ds_engine` shards one.
"""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any

import torch
from ts.context import Context
from ts.torch_handler.distributed.base_deepspeed_handler import BaseDeepSpeedHandler as TorchServeDeepSpeedHandler

from dsserve.parallel.parent_watch import Parents, die_with_parent
from dsserve.parallel.process_group import init_process_group
from dsserve.parallel.rank import RankInfo, prepare_environment, select_device
from dsserve.worker.cleanup import sweep, sweep_build_locks, torchrun_log_folder
from dsserve.worker.logs import set_up_logs
from dsserve.worker.watchdog import Watchdog


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
        section = self.yaml_config.get("handler") or {}
        set_up_logs(self.rank.rank, str(section.get("log_format", "text")))
        self.device = select_device(self.yaml_config.get("deviceType"), self.rank)
        prepare_environment(self.device, self.rank, section.get("num_threads"))
        if self.rank.is_leader:
            sweep(torchrun_log_folder())
            sweep_build_locks()
        init_process_group(self.rank)
