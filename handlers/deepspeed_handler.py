"""The ready text-generation handler; torch-model-archiver's `--handler`. TorchServe wants one class in this file.

Loads a Hugging Face causal language model, shards it with DeepSpeed and serves it with continuous batching
(`continuousBatching: true`, `parallelType: tp`). All behaviour lies in `dsserve`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from dsserve.base_handler import BaseDeepSpeedHandler
from dsserve.config import read_handler_config
from dsserve.distributed import end_rank
from dsserve.ds_engine import get_ds_engine
from dsserve.errors import LoadError
from dsserve.generation.build import build_engine, check_engine_choice
from dsserve.hf_model import load_model, load_outline
from dsserve.protocol.batch import LiveBatch
from dsserve.settings import check_server_settings
from dsserve.sharding.heads import plan_kv_copies

logger = logging.getLogger(__name__)


class DeepSpeedHandler(BaseDeepSpeedHandler):
    """Text generation over HTTP; rank 0 leads, the other ranks follow its plans."""

    def initialize(self, ctx: Any) -> None:
        """Loads, shards, proves and warms the model.

        Raises:
            LoadError: one line that says what to mend; it is also in the worker's log.
        """
        try:
            self._initialize(ctx)
        except LoadError as error:
            logger.error("[dsserve] LoadError: %s", error)
            raise

    def _initialize(self, ctx: Any) -> None:
        started = time.perf_counter()
        config = read_handler_config(ctx.model_yaml_config or {})
        slots = check_server_settings(ctx.model_yaml_config, ctx.system_properties["batch_size"])
        super().initialize(ctx)
        logger.info("[dsserve] rank %d of %d: loading on %s", self.rank.rank, self.rank.world_size, self.device)
        plan_kv_copies(load_outline(config, self.model_dir), self.rank.world_size)  # refuses before the long load
        loaded = load_model(config, self.model_dir)
        logger.info("[dsserve] rank %d: loaded in %.1f s", self.rank.rank, time.perf_counter() - started)
        check_engine_choice(ctx, self.rank.world_size)
        ds_engine = get_ds_engine(loaded.model, ctx)
        self.model = ds_engine.module
        self._engine, limits = build_engine(ds_engine, loaded, config, slots, self.rank, self.device)
        self._batch = LiveBatch(self._engine, loaded.tokenizer, limits, config.num_scheduler_steps)
        self.initialized = True
        logger.info("[dsserve] rank %d: ready after %.1f s", self.rank.rank, time.perf_counter() - started)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """One call: all live requests in `data`, one item a row back."""
        try:
            if self.rank.is_leader:
                return self._batch.serve(data, context)
            self._engine.follow()
            return [b""] * len(data)
        except Exception as error:
            # The ranks no longer agree on what comes next, and a rank that waits for another waits for ever.
            end_rank(error)
            raise
