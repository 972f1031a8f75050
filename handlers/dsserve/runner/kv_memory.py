"""How many pages the KV cache gets: what is free beside weights and passes.

On a GPU a pass of prompts is carried out to see what it takes. Covers AutoTP's engine; kernel injection has its
workspace (`injection.workspace`). Allocates nothing that stays (`kv.store`) and sets no limits (`limits`).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from dsserve.config.handler import YAML_FILE, HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.core.step_input import PREFILL_BUCKETS
from dsserve.modeling.dtype import model_dtype
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.kv_heads import head_size
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.autotp import PAGE_TOKENS, KVSize, ModelRunner
from dsserve.runner.step_graphs import MOST_TOKENS

_GIB = 2**30
# On a CPU all ranks' pages together, where one text does not need more: other programs live there, too.
_HOST_BYTES = 4 * _GIB
# For the programs of graphs, the workspaces of cuBLAS (32 MiB a stream on Hopper), and what NCCL and Triton take when
# they are first used. Beside torch's own memory 140 MiB of it were taken at TP=1 (H100, 32 layers; 30 of 8192 wide took
# as much), 75 at TP=2.
_LIBRARIES = 512 * 2**20
# Bytes of a row's number for a word of the vocabulary that choosing tokens takes on a GPU: fp32 logits, and fp64
# weights and sums.
_SAMPLER_BYTES = 4 + 3 * 8


@dataclass(frozen=True)
class KVPlan:
    """The KV cache of every rank.

    Attributes:
        nbytes: what all pages of a rank can grow to.
    """

    size: KVSize
    nbytes: int

    @property
    def tokens(self) -> int:
        """Whose keys and values all pages hold."""
        return self.size.pages * self.size.page_tokens


def plan_kv(
    model_config: Any,
    config: HandlerConfig,
    max_model_len: int,
    dtype: torch.dtype,
    rank: RankInfo,
    device: torch.device,
    passes: int = 0,
) -> KVPlan:
    """As many pages as fit; one text of the longest kind must.

    Args:
        passes: bytes that stay free for reading prompts, see `measure_passes`.

    Raises:
        LoadError: too little memory, with the numbers and what would fit.
    """
    a_token = _token_bytes(model_config, dtype, rank)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps counts as taken
        free, sharers = torch.cuda.mem_get_info(device)[0], 1
    else:
        free, sharers = psutil.virtual_memory().available, rank.local_world_size
    budget = int(max(0, free - passes) * config.kv_memory_fraction)
    needed = -(-max_model_len // PAGE_TOKENS)
    if device.type != "cuda":
        budget = min(budget, max(_HOST_BYTES, (needed + 1) * PAGE_TOKENS * a_token * sharers))
    pages = agree_on_least(budget // (PAGE_TOKENS * a_token * sharers), rank) - 1  # page 0 is the padding's
    if pages < needed:
        raise LoadError(_too_little(config, max_model_len, pages, free, passes, PAGE_TOKENS * a_token * sharers))
    rows = min(config.rows(device.type), pages)
    size = KVSize(rows, max_model_len, pages)
    return KVPlan(size, (pages + 1) * PAGE_TOKENS * a_token)


def _token_bytes(model_config: Any, dtype: torch.dtype, rank: RankInfo) -> int:
    """Keys and values of one token on the rank that has the most heads."""
    text_config = model_config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    local_heads = -(-heads // rank.world_size)
    return int(2 * text_config.num_hidden_layers * local_heads * head_size(text_config) * dtype.itemsize)


def _too_little(config: HandlerConfig, length: int, pages: int, free: int, passes: int, a_page: int) -> str:
    """The error's text; each setting that it names is enough alone."""
    less = f", {passes / _GIB:.2f} of them for passes and graphs," if passes else ""
    way = (
        f"set handler.max_model_len: {pages * PAGE_TOKENS}"
        if pages > 0
        else ("use more ranks (torchrun.nproc-per-node) or deepspeed.quantization")
    )
    return (
        f"{YAML_FILE}: a text of max_model_len {length} tokens needs {-(-length // PAGE_TOKENS) * a_page / _GIB:.2f} "
        f"GiB of KV cache; of {free / _GIB:.2f} GiB free{less} it may take {max(0, pages) * a_page / _GIB:.2f} GiB "
        f"(handler.kv_memory_fraction {config.kv_memory_fraction:g}): {way}"
    )


def measure_passes(
    module: Any, config: HandlerConfig, max_model_len: int, tokens: int, rank: RankInfo, memory: PrefillMemory
) -> int:
    """Bytes that stay free on this rank's GPU for reading prompts, for graphs and for libraries; 0 on a CPU. All ranks
    must call it.

    Passes are carried out, the last one of as many tokens as a step may have. Captured passes have memory of their
    own, and before each is captured it runs without a graph. What a decode step takes is small beside them, the logits
    of its rows are not.

    Args:
        tokens: of a step at most.
        memory: learns what the passes take.

    Raises:
        LoadError: there is no memory for them.
        torch.OutOfMemoryError: nor for the first, short one.
    """
    device = memory.device
    if device.type != "cuda":
        return 0
    gc.collect()  # garbage that Python frees within a pass would hide the pass's memory
    longest = min(tokens, max_model_len - 1)
    runner = ModelRunner(module, KVSize.of_rows(1, longest + 1), rank, device, memory)
    # The memory of a short prompt says whether all ranks have room for the long one. Otherwise one rank could fail in
    # it while the others wait.
    for size in (min(longest, PREFILL_BUCKETS[-1]), longest):
        runner.trial().step((0, (0,) * size))
    # Under a mask what was computed before counts, too.
    eager = tokens if runner.is_packed else max(tokens, max_model_len)
    captured = memory.needed(min(tokens, MOST_TOKENS)) if config.cuda_graphs and runner.is_packed else 0
    words = config.rows(device.type) * module.config.get_text_config().vocab_size
    logits = words * (2 * model_dtype(module).itemsize + _SAMPLER_BYTES)
    return memory.needed(eager) + captured + logits + _LIBRARIES
