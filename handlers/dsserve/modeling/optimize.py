"""Replaces what runs faster otherwise, in a sharded model: matmuls, the operations between them, layers.

Each replacement gives the same numbers, or is not made; the engine's self-check looks at all of them together. Does not
shard (`ds_engine`) and captures nothing (`runner.step_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsserve.config.handler import YAML_FILE, HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.kernels.ops import load_ops
from dsserve.modeling.fused_layers import can_fuse_layers, use_fused_layers
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.modeling.linear import can_pack, pack_weights
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo
from dsserve.parallel.rank_sum import make_rank_sums


def tune(module: Any, config: HandlerConfig, rank: RankInfo, device: torch.device, most_tokens: int) -> str:
    """Replaces in place what can be; returns what, for the log. All ranks must call it.

    Args:
        most_tokens: of a captured pass.

    Raises:
        LoadError: an option that is set to true is not possible here.
    """
    lacks = "it needs a torch with oneDNN's packed linear"
    can = bool(agree_on_least(int(can_pack(module)), rank))
    packed = _apply("pack_weights", config.pack_weights, can, lambda: pack_weights(module), lacks)
    ops = load_ops(device) if config.compiled_ops else None
    if not agree_on_least(int(ops is not None), rank):
        ops = None  # each rank makes the same passes, or they wait for each other
    lacks = "a CPU needs g++ and ninja, a GPU Triton (see the log above)"
    fused = _apply("compiled_ops", config.compiled_ops, ops is not None, lambda: use_fused_ops(module, ops), lacks)
    said = f"{packed} packed matmuls, {fused} fused operations"
    if device.type != "cuda":
        return said
    can_fuse = ops is not None and can_fuse_layers(module, rank.world_size)
    if agree_on_least(int(can_fuse), rank):
        sums = make_rank_sums(module, rank, max(config.most_running, most_tokens))
        said += f", {use_fused_layers(module, sums)} fused layers that sum {sums[0].way}"
    return said


def _apply(key: str, wanted: bool | str, possible: bool, apply: Callable[[], int], lacks: str) -> int:
    """Carries out an option; `auto` = where it is possible. Returns how much was replaced."""
    if wanted is not False and possible:
        return apply()
    if wanted is True:
        raise LoadError(f"{YAML_FILE}: handler.{key}: true is not possible: {lacks}; set it to auto")
    return 0
