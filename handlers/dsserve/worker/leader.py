"""Rank 0 of a served model: its engine under a time limit, the live requests, and what the world is told of them.

Puts the parts together and hands calls on. Loads nothing (`load`) and decides nothing (`live_batch`, `engine`).
"""

from __future__ import annotations

from typing import Any

import torch

from dsserve.config.handler import HandlerConfig
from dsserve.config.limits import fit_waiting
from dsserve.engine.build import build_engine
from dsserve.engine.guarded_engine import EngineThread, LeaderEngine
from dsserve.engine.observer import Observers
from dsserve.loading.hf_model import LoadedModel
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.sharded_model import ShardedModel
from dsserve.observability.metrics import Metrics
from dsserve.observability.metrics_server import MetricsEndpoint
from dsserve.observability.tracing import spans_from_env
from dsserve.parallel.rank import RankInfo
from dsserve.protocol.served import describe_model
from dsserve.worker.call_length import CallLength
from dsserve.worker.control import ControlFiles
from dsserve.worker.live_batch import LiveBatch
from dsserve.worker.watchdog import Watchdog, end_process

# After an answer that is the worker's last one: the time it has to leave through the socket.
ANSWER_S = 0.5


class Leader:
    """Answers TorchServe's calls; the other ranks follow its plans.

    Attributes:
        engine: the engine under its time limit.

    Args:
        engine_s: how long a call may wait for the engine.
        watchdog: ends the process when the engine is broken and the last answers are under way.

    Raises:
        LoadError: see `build_engine`.
    """

    def __init__(
        self,
        ctx: Any,
        config: HandlerConfig,
        model: tuple[LoadedModel, ShardedModel],
        rank: RankInfo,
        device: torch.device,
        clock: LoadClock,
        engine_s: float,
        watchdog: Watchdog,
    ) -> None:
        loaded, sharded = model
        thread = EngineThread(device)
        metrics = Metrics(ctx.model_name, model_version(ctx))
        observer = Observers(metrics, spans_from_env(ctx.model_name))
        engine, limits, grammars = thread.call(
            lambda: build_engine(sharded, loaded, config, rank, device, clock, observer)
        )
        limits = fit_waiting(limits, config, ctx.system_properties["batch_size"])
        served = describe_model(ctx.model_name, sharded, loaded, limits, grammars, rank.world_size)
        self._control = ControlFiles.from_env()
        self.engine = LeaderEngine(engine, thread, engine_s, lambda: watchdog.end_in(ANSWER_S))
        steps, length = config.num_scheduler_steps, CallLength(config.max_stream_delay_ms / 1e3)
        self._batch = LiveBatch(self.engine, served, steps, length, self._control.is_draining, metrics.refused)
        metrics.loaded(clock.elapsed, served.engine, limits.max_running)
        metrics.watch_memory(device)
        endpoint = MetricsEndpoint.from_env(metrics.registry)
        if endpoint is not None:
            endpoint.start()

    def serve(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """One call: all live requests in `data`, one item a row back."""
        if self.engine.has_failed:  # the errors have left: what TorchServe sends now goes to the next worker, or fails
            end_process()
        self._control.report(len(data))
        items = self._batch.serve(data, context)
        self._control.report(self._batch.live)
        return items


def model_version(ctx: Any) -> str:
    """The version that the archive was packed with."""
    return str(((ctx.manifest or {}).get("model") or {}).get("modelVersion", ""))
