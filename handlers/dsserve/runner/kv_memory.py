"""How many rows the KV cache gets: what is free beside weights and passes, in rows of a whole context.

On a GPU passes of prompts are carried out to see what they take. Covers AutoTP's engine; kernel injection has its
workspace (`injection.workspace`). Allocates nothing that stays (`kv.cache`) and sets no limits (`limits`).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from dsserve.attention.decode import uses_decode_attention
from dsserve.config.handler import YAML_FILE, HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.core.request import Limits
from dsserve.core.step_plan import Admission, Plan
from dsserve.modeling.dtype import model_dtype
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.kv_heads import head_size
from dsserve.parallel.rank import RankInfo
from dsserve.runner import decode_graphs, prefill_graphs
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.autotp import KV_STEP, ModelRunner, row_capacity
from dsserve.runner.base import prefill_at_load
from dsserve.runner.prefill_batch import PREFILL_BUCKETS, prefill_bucket

# Kept rows where the settings leave their number open; fewer where memory is short.
_KEPT_ROWS = 8
_GIB = 2**30
# For the programs of graphs, the workspaces of cuBLAS (32 MiB a stream on Hopper), the sampler, and what NCCL and
# Triton take when they are first used. Beside torch's own memory 140 MiB of it were taken at TP=1 (H100, 32 layers; 30
# of 8192 wide took as much), 75 at TP=2.
_LIBRARIES = 512 * 2**20


@dataclass(frozen=True)
class KVPlan:
    """Rows of the KV cache, as many on every rank.

    Attributes:
        slots: rows of the texts that run.
        kept: rows behind them for prompts that may come again.
        nbytes: what all rows of a rank can grow to.
    """

    slots: int
    kept: int
    nbytes: int


@dataclass(frozen=True)
class _Room:
    """What a rank's rows may take.

    Attributes:
        free: bytes beside the weights.
        passes: bytes of them that are left for reading prompts.
        tokens: how many tokens' keys and values fit, on the rank that has the least.
    """

    free: int
    passes: int
    tokens: int


def plan_kv_rows(
    model_config: Any,
    config: HandlerConfig,
    limits: Limits,
    dtype: torch.dtype,
    rank: RankInfo,
    device: torch.device,
    passes: int = 0,
) -> KVPlan:
    """As many rows as fit: the slots that the settings name must, or at least one; kept rows take what is left.

    Args:
        passes: bytes that stay free for reading prompts, see `measure_passes`.

    Raises:
        LoadError: too little memory, with the numbers and what would fit.
    """
    a_token, capacity = _token_bytes(model_config, dtype, rank), row_capacity(limits.max_model_len)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps counts as taken
        free, sharers = torch.cuda.mem_get_info(device)[0], 1
    else:
        free, sharers = psutil.virtual_memory().available, rank.local_world_size
    budget = int(max(0, free - passes) * config.kv_memory_fraction)
    room = _Room(free, passes, agree_on_least(budget // (a_token * sharers), rank))
    fitting = room.tokens // capacity
    kept = 0 if config.prefix_cache_rows == "auto" else config.prefix_cache_rows
    slots = config.most_running
    if config.max_running == "auto":
        slots = max(1, min(slots, fitting - kept))
    if slots + kept > fitting:
        raise LoadError(_too_little(config, room, slots, kept, capacity, a_token * sharers))
    if config.prefix_cache_rows == "auto":
        kept = min(_KEPT_ROWS, fitting - slots)
    return KVPlan(slots, kept, (slots + kept) * capacity * a_token)


def _token_bytes(model_config: Any, dtype: torch.dtype, rank: RankInfo) -> int:
    """Keys and values of one token on the rank that has the most heads."""
    text_config = model_config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    local_heads = -(-heads // rank.world_size)
    return int(2 * text_config.num_hidden_layers * local_heads * head_size(text_config) * dtype.itemsize)


def _too_little(config: HandlerConfig, room: _Room, slots: int, kept: int, capacity: int, a_token: int) -> str:
    """The error's text; each setting that it names is enough alone."""
    rows = slots + kept
    fitting, ways = room.tokens // capacity, []
    if config.max_running != "auto" and fitting > kept:
        ways.append(f"handler.max_running: {fitting - kept}")
    if kept and fitting >= slots:
        ways.append(f"handler.prefix_cache_rows: {fitting - slots}")
    if room.tokens // rows >= KV_STEP:
        ways.append(f"handler.max_model_len: {room.tokens // rows // KV_STEP * KV_STEP}")
    less = f", {room.passes / _GIB:.2f} of them for passes and graphs," if room.passes else ""
    return (
        f"{YAML_FILE}: {rows} row(s) of {capacity} tokens need {rows * capacity * a_token / _GIB:.2f} GiB of KV cache; "
        f"of {room.free / _GIB:.2f} GiB free{less} it may take {room.tokens * a_token / _GIB:.2f} GiB "
        f"(handler.kv_memory_fraction {config.kv_memory_fraction:g}): "
        + (f"set {' or '.join(ways)}" if ways else "use more ranks (torchrun.nproc-per-node) or deepspeed.quantization")
    )


def measure_passes(module: Any, config: HandlerConfig, limits: Limits, most: int, memory: PrefillMemory) -> int:
    """Bytes that stay free on this rank's GPU for reading prompts, for graphs and for libraries; 0 on a CPU. All ranks
    must call it.

    Passes are carried out, the last one of as many tokens as a prompt may have. Captured passes have memory of their
    own, and before each is captured it runs without a graph. What a decode step takes is small beside them, the logits
    of all graphs are not. A long prompt that is read under a mask is counted whole, as `ModelRunner` counts it.

    Args:
        most: tokens of a pass at most.
        memory: learns what the passes take.

    Raises:
        LoadError: there is no memory for them.
        torch.OutOfMemoryError: nor for the first, short one.
    """
    if memory.device.type != "cuda":
        return 0
    longest, slots = limits.max_model_len - 1, config.most_running
    gc.collect()  # garbage that Python frees within a pass would hide the pass's memory
    by_span = _carry_out(module, min(most, longest), memory)
    captured = rows = 0
    if config.cuda_graphs:
        rows = decode_graphs.captured_rows(slots, row_capacity(limits.max_model_len))
        if uses_decode_attention(module):
            captured = prefill_graphs.most_captured(slots, longest, by_span, most)
            rows += prefill_graphs.captured_rows(slots, longest, by_span, most)
    together = min(most, prefill_bucket(slots * longest))
    eager = max(together, captured) if by_span else max(together, longest)
    logits = rows * module.config.get_text_config().vocab_size * model_dtype(module).itemsize
    return memory.needed(eager) + (memory.needed(captured) if captured else 0) + logits + _LIBRARIES


def _carry_out(module: Any, tokens: int, memory: PrefillMemory) -> bool:
    """Reads a prompt of `tokens`; returns whether attention found it by its span.

    A short prompt comes first, and attention never finds the first one by its span. The memory of the short prompt says
    whether all ranks have room for the long one. Otherwise one rank could fail in it while the others wait.
    """
    runner = ModelRunner(module, 1, tokens + 1, memory.device, memory=memory)
    for size in (min(tokens, PREFILL_BUCKETS[-1]), tokens):
        prefill_at_load(runner, Plan(admit=(Admission((0,) * size),)))
        runner.execute(Plan(evict=(0,)))
    return runner.forward.reads_by_span
