"""The ready text-generation handler; torch-model-archiver's `--handler`. TorchServe wants one class in this file.

Loads a Hugging Face causal language model, shards it with DeepSpeed and serves it with continuous batching
(`continuousBatching: true`, `parallelType: tp`). All behaviour lies in `dsserve`.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

from dsserve.config.handler import HandlerConfig, read_handler_config
from dsserve.config.limits import read_limits
from dsserve.config.torchserve import check_server_settings, read_time_limits
from dsserve.engine.build import build_engine
from dsserve.engine.guarded_engine import EngineThread, LeaderEngine
from dsserve.engine.observer import Observers
from dsserve.injection.attempt import KernelInjection
from dsserve.loading import shard_cache
from dsserve.loading.ds_engine import get_ds_engine, read_settings
from dsserve.loading.hf_model import LoadedModel, load_model, load_outline, locate_model, max_position
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.shard_cache import Shards
from dsserve.loading.shard_manifest import Manifest
from dsserve.modeling.dtype import model_dtype
from dsserve.observability.metrics import Metrics
from dsserve.observability.metrics_server import MetricsEndpoint
from dsserve.observability.tracing import spans_from_env
from dsserve.parallel.kv_heads import plan_kv_copies
from dsserve.protocol.served import describe_model
from dsserve.worker.base_handler import BaseDeepSpeedHandler
from dsserve.worker.call_length import CallLength
from dsserve.worker.control import ControlFiles
from dsserve.worker.exit import end_rank
from dsserve.worker.live_batch import LiveBatch
from dsserve.worker.load_guard import LoadGuard
from dsserve.worker.logs import set_serving_level
from dsserve.worker.watchdog import end_process

logger = logging.getLogger(__name__)

# After an answer that is the worker's last one: the time it has to leave through the socket.
ANSWER_S = 0.5


class DeepSpeedHandler(BaseDeepSpeedHandler):
    """Text generation over HTTP; rank 0 leads, the other ranks follow its plans."""

    def initialize(self, ctx: Any) -> None:
        """Loads, shards, proves and warms the model.

        Raises:
            LoadError: one line that says what to mend; it is also in the worker's log.
        """
        self._guard = LoadGuard()
        with self._guard.load():
            self._initialize(ctx)

    def _initialize(self, ctx: Any) -> None:
        config = read_handler_config(ctx.model_yaml_config or {})
        self._guard.what = config.model_path
        sequences = config.most_running + config.max_waiting
        check_server_settings(ctx.model_yaml_config, ctx.system_properties["batch_size"], sequences)
        self._limits = read_time_limits(ctx.model_yaml_config, config.collective_timeout)
        super().initialize(ctx)
        self._guard.clock = clock = LoadClock(self.rank.rank, self.device)
        with self.watchdog.limit(self._limits.load_s, "the load"):
            self._load(ctx, config, clock)
            self._guard.meet("the end")
        # What a load leaves lives as long as the process: looking for garbage in it would stop all streams for 0.2 s.
        gc.collect()
        gc.freeze()
        self.initialized = True
        logger.info("[dsserve] rank %d: ready after %s", self.rank.rank, clock.summary())
        set_serving_level(self.rank.rank, config.log_level)

    def _load(self, ctx: Any, config: HandlerConfig, clock: LoadClock) -> None:
        logger.info("[dsserve] rank %d of %d: loading on %s", self.rank.rank, self.rank.world_size, self.device)
        loaded, shards = self._read(ctx, config, clock)
        self._guard.meet("files")
        ds_engine = get_ds_engine(loaded.model, ctx, shards, clock, config.most_running)
        self._guard.meet("shards")
        self.model = ds_engine.module
        if not self.rank.is_leader:
            self._engine, _, _ = build_engine(ds_engine, loaded, config, self.rank, self.device, clock)
            return
        thread = EngineThread(self.device)
        metrics = Metrics(ctx.model_name, model_version(ctx))
        observer = Observers(metrics, spans_from_env(ctx.model_name))
        engine, limits, grammars = thread.call(
            lambda: build_engine(ds_engine, loaded, config, self.rank, self.device, clock, observer)
        )
        served = describe_model(ctx.model_name, ds_engine, loaded, limits, grammars, self.rank.world_size)
        self._control = ControlFiles.from_env()
        self._leader = LeaderEngine(engine, thread, self._limits.engine_s, lambda: self.watchdog.end_in(ANSWER_S))
        steps, length = config.num_scheduler_steps, CallLength(config.max_stream_delay_ms / 1e3)
        self._batch = LiveBatch(self._leader, served, steps, length, self._control.is_draining, metrics.refused)
        metrics.loaded(clock.elapsed, served.engine, limits.max_running)
        metrics.watch_memory(self.device)
        endpoint = MetricsEndpoint.from_env(metrics.registry)
        if endpoint is not None:
            endpoint.start()

    def _read(self, ctx: Any, config: HandlerConfig, clock: LoadClock) -> tuple[LoadedModel, Shards | None]:
        """The model: its weights' files, or an outline and the cache that will fill it."""
        with clock.phase("files"):
            folder = locate_model(config, self.model_dir)
            outline = load_outline(config, folder)
            self._guard.what = type(outline).__name__
            settings = read_settings(ctx, self.rank.world_size, model_dtype(outline))
            # Refusals come before the long load.
            injects = settings.kernel_inject and KernelInjection(settings, self.rank, self.device).is_possible(outline)
            if not injects:
                plan_kv_copies(outline, self.rank.world_size)
                read_limits(config, max_position(outline.config), outline.config)
            numbers = sum(parameter.numel() for parameter in outline.parameters())
            clock.share_bytes = numbers * settings.dtype.itemsize // settings.tp_size
            cache = self.model_dir / config.shard_cache if config.shard_cache else folder / shard_cache.FOLDER
            wanted = Manifest.describe(outline, folder, settings.tp_size, settings.dtype)
            shards = None if injects else shard_cache.find_shards(wanted, cache, self.rank)
            return load_model(config, folder, outline if shards else None), shards

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """One call: all live requests in `data`, one item a row back."""
        try:
            with self.watchdog.limit(self._limits.call_s, "a call of the handler"):
                if self.rank.is_leader:
                    return self._lead(data, context)
                self._engine.follow()
                return [b""] * len(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a library's panic is no Exception
            # The ranks no longer agree on what comes next, and a rank that waits for another waits for ever.
            end_rank(error)
            raise

    def _lead(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        if self._leader.has_failed:  # the errors have left: what TorchServe sends now goes to the next worker, or fails
            end_process()
        self._control.report(len(data))
        items = self._batch.serve(data, context)
        self._control.report(self._batch.live)
        return items


def model_version(ctx: Any) -> str:
    """The version that the archive was packed with."""
    return str(((ctx.manifest or {}).get("model") or {}).get("modelVersion", ""))
