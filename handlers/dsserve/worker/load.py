"""A model's way from its folder to a sharded model. The handler takes it, and so does whoever shards or measures.

The folder is looked at first, so that refusals come before the long load. Makes no engine of requests (`engine.build`).
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ts.context import Context

from dsserve.config.deepspeed import DeepSpeedSettings
from dsserve.config.handler import HandlerConfig, read_handler_config
from dsserve.config.limits import read_context
from dsserve.config.torchserve import TimeLimits, check_server_settings, read_time_limits
from dsserve.injection.attempt import KernelInjection
from dsserve.loading import shard_cache
from dsserve.loading.ds_engine import read_settings, shard_model
from dsserve.loading.hf_model import LoadedModel, load_model, load_outline, locate_model, max_position
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.shard_cache import Shards
from dsserve.loading.shard_manifest import Manifest
from dsserve.loading.sharded_model import ShardedModel
from dsserve.modeling.dtype import model_dtype
from dsserve.parallel.kv_heads import plan_kv_copies
from dsserve.parallel.rank import RankInfo
from dsserve.worker.load_guard import LoadGuard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundModel:
    """What is known of a model before its weights are read.

    Attributes:
        folder: the model's own files.
        outline: the model on the meta device.
        settings: the `deepspeed:` section for this model.
        manifest: what a cache of its shards says that fits.
        cache: the folder of that cache, which may not exist.
    """

    folder: Path
    outline: Any
    settings: DeepSpeedSettings
    manifest: Manifest
    cache: Path


def read_sections(ctx: Context) -> tuple[HandlerConfig, TimeLimits]:
    """The `handler:` section of model-config.yaml, and the time limits that follow from it and TorchServe's own keys.

    Raises:
        LoadError: a key or value that cannot work; the message names it.
    """
    yaml_config = ctx.model_yaml_config or {}
    config = read_handler_config(yaml_config)
    check_server_settings(yaml_config, ctx.system_properties["batch_size"], config.stated_texts)
    return config, read_time_limits(yaml_config, config.collective_timeout)


def find_model(ctx: Context, config: HandlerConfig, model_dir: Path, world_size: int) -> FoundModel:
    """Looks at the model that `config` names; reads none of its weights.

    Args:
        model_dir: the folder that relative paths in `config` are relative to.

    Raises:
        LoadError: no such model, or settings that cannot work with it.
    """
    folder = locate_model(config, model_dir)
    outline = load_outline(config, folder)
    settings = read_settings(ctx, world_size, model_dtype(outline))
    manifest = Manifest.describe(outline, folder, settings.tp_size, settings.dtype)
    cache = model_dir / config.shard_cache if config.shard_cache else folder / shard_cache.FOLDER
    return FoundModel(folder, outline, settings, manifest, cache)


def read_model(
    found: FoundModel, config: HandlerConfig, rank: RankInfo, device: torch.device, clock: LoadClock
) -> tuple[LoadedModel, Shards | None]:
    """The model: its weights' files, or an outline and the cache that will fill it.

    Raises:
        LoadError: a model that cannot be cut for these ranks, or whose files are not whole.
    """
    outline, settings = found.outline, found.settings
    injects = settings.kernel_inject and KernelInjection(settings, rank, device).is_possible(outline)
    if not injects:
        plan_kv_copies(outline, rank.world_size)
        read_context(config, max_position(outline.config), outline.config)
    numbers = sum(parameter.numel() for parameter in outline.parameters())
    clock.share_bytes = numbers * settings.dtype.itemsize // settings.tp_size
    shards = None if injects else shard_cache.find_shards(found.manifest, found.cache, rank)
    return load_model(config, found.folder, outline if shards else None), shards


def load_sharded(
    ctx: Context,
    config: HandlerConfig,
    model_dir: Path,
    rank: RankInfo,
    device: torch.device,
    clock: LoadClock,
    max_batch: int | None = None,
    guard: LoadGuard | None = None,
) -> tuple[LoadedModel, ShardedModel]:
    """The loaded model, and what `shard_model` made of it.

    Args:
        max_batch: the largest batch of kernel injection; default: `config.batch_rows`.
        guard: hears of the architecture and of each stage; default: one that meets nobody.

    Raises:
        LoadError: one line that says what to mend.
    """
    guard = guard or LoadGuard()
    logger.info("[dsserve] rank %d of %d: loading on %s", rank.rank, rank.world_size, device)
    with clock.phase("files"):
        found = find_model(ctx, config, model_dir, rank.world_size)
        guard.what = type(found.outline).__name__
        loaded, shards = read_model(found, config, rank, device, clock)
    guard.meet("files")
    sharded = shard_model(loaded.model, ctx, shards, clock, max_batch or config.batch_rows)
    guard.meet("shards")
    return loaded, sharded


def keep_for_good() -> None:
    """What a load leaves lives as long as the process: looking for garbage in it would stop all streams for 0.2 s."""
    gc.collect()
    gc.freeze()
