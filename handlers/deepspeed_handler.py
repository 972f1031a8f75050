"""The ready text-generation handler, torch-model-archiver's `--handler`. TorchServe wants one class in this file."""

from __future__ import annotations

import logging
from typing import Any

from dsserve.config.handler import HandlerConfig
from dsserve.engine.build import build_engine
from dsserve.loading.load_clock import LoadClock
from dsserve.worker.base_handler import BaseDeepSpeedHandler
from dsserve.worker.exit import end_rank
from dsserve.worker.leader import Leader
from dsserve.worker.load import keep_for_good, load_sharded, read_sections
from dsserve.worker.load_guard import LoadGuard
from dsserve.worker.logs import set_serving_level

logger = logging.getLogger(__name__)


class DeepSpeedHandler(BaseDeepSpeedHandler):
    """Text generation over HTTP with continuous batching; rank 0 leads, the other ranks follow its plans."""

    def initialize(self, ctx: Any) -> None:
        """Loads, shards, proves and warms the model. Raises LoadError: one line, on all ranks the same."""
        with LoadGuard().load() as guard:
            config, self._limits = read_sections(ctx)
            guard.what = config.model_path
            super().initialize(ctx)
            guard.clock = clock = LoadClock(self.rank.rank, self.device)
            with self.watchdog.limit(self._limits.load_s, "the load"):
                self._load(ctx, config, clock, guard)
                guard.meet("the end")
        keep_for_good()
        self.initialized = True
        logger.info("[dsserve] rank %d: ready after %s", self.rank.rank, clock.summary())
        set_serving_level(self.rank.rank, config.log_level)

    def _load(self, ctx: Any, config: HandlerConfig, clock: LoadClock, guard: LoadGuard) -> None:
        loaded, sharded = load_sharded(ctx, config, self.model_dir, self.rank, self.device, clock, guard=guard)
        self.model = sharded.module
        if self.rank.is_leader:
            model, limit_s = (loaded, sharded), self._limits.engine_s
            self._leader = Leader(ctx, config, model, self.rank, self.device, clock, limit_s, self.watchdog)
        else:
            self._engine, _, _ = build_engine(sharded, loaded, config, self.rank, self.device, clock)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """One call: all live requests in `data`, one item a row back."""
        try:
            with self.watchdog.limit(self._limits.call_s, "a call of the handler"):
                if self.rank.is_leader:
                    return self._leader.serve(data, context)
                self._engine.follow()
                return [b""] * len(data)
        except BaseException as error:  # a library's panic, too: the ranks no longer agree
            end_rank(error)
            raise
