"""Makes the engine of one rank from DeepSpeed's module: memory, packed weights, proof, warm-up.

AutoTP's module gets KV slots and continuous batching, one with injected kernels their batches. Refuses at load, with
the reason, what the engine could not do exactly. Does not load or shard the model and sets no limits (`limits`).
"""

from __future__ import annotations

import logging
from typing import Any

import psutil
import torch

from dsserve.config import YAML_FILE, HandlerConfig
from dsserve.distributed import RankInfo, agree_on_least
from dsserve.errors import LoadError
from dsserve.fused_layers import FusedLayer
from dsserve.generation.batch_scheduler import BatchScheduler
from dsserve.generation.choice import HostChoice, Launch
from dsserve.generation.decode_attention import uses_decode_attention
from dsserve.generation.detokenizer import TextStream
from dsserve.generation.device_sampler import DeviceSampler
from dsserve.generation.engine import Engine
from dsserve.generation.grammar import GrammarCompiler
from dsserve.generation.kernel_runner import KernelRunner
from dsserve.generation.limits import read_limits
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.observer import Observer
from dsserve.generation.prefix_cache import PrefixCache
from dsserve.generation.request import Limits
from dsserve.generation.runner import Runner
from dsserve.generation.scheduler import Scheduler
from dsserve.generation.tuning import tune
from dsserve.generation.warmup import verify_runner, warm_up, warm_up_batches
from dsserve.hf_model import LoadedModel
from dsserve.load_clock import LoadClock
from dsserve.sharding.heads import head_size

logger = logging.getLogger(__name__)

# Kept rows where the settings leave their number open; fewer where memory is short.
_KEPT_ROWS = 8
# About 0.1 s of a 7 billion parameter model on one H100.
_IDLE_TOKENS = 4096


def plan_kv_rows(
    model_config: Any, config: HandlerConfig, limits: Limits, dtype: torch.dtype, rank: RankInfo, device: torch.device
) -> tuple[int, int]:
    """How many rows of the KV cache keep ended requests, and the bytes that all rows of this rank can grow to.

    Raises:
        LoadError: the slots, or the kept rows that the settings name, need more than what is free, with the numbers.
    """
    text_config = model_config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    local_heads = -(-heads // rank.world_size)
    a_row = (
        2 * text_config.num_hidden_layers * local_heads * limits.max_model_len * head_size(text_config) * dtype.itemsize
    )
    if device.type == "cuda":
        free, sharers = torch.cuda.mem_get_info(device)[0], 1
    else:
        free, sharers = psutil.virtual_memory().available, rank.local_world_size
    fitting = agree_on_least(free // (a_row * sharers), rank)
    wanted = config.prefix_cache_rows
    kept = min(_KEPT_ROWS, max(0, fitting - config.max_running)) if wanted == "auto" else wanted
    rows = config.max_running + kept
    if rows > fitting:
        raise LoadError(
            f"{YAML_FILE}: {rows} rows of {limits.max_model_len} tokens need {rows * a_row * sharers / 2**30:.1f} GiB "
            f"of KV cache, {free / 2**30:.1f} GiB are free; lower handler.max_running, prefix_cache_rows or "
            "max_model_len"
        )
    return kept, rows * a_row


def build_engine(
    ds_engine: Any,
    loaded: LoadedModel,
    config: HandlerConfig,
    rank: RankInfo,
    device: torch.device,
    clock: LoadClock,
    observer: Observer | None = None,
) -> tuple[Engine, Limits, GrammarCompiler]:
    """The engine of this rank, proven and warm, what requests may ask of it, and the maker of its grammars.

    Args:
        ds_engine: what `get_ds_engine` returned; its self-check is repeated through the KV slots.
        observer: of rank 0's engine.

    Raises:
        LoadError: see `read_limits`, `plan_kv_rows` and `SelfCheck.verify`.
    """
    if ds_engine.workspace is None:
        limits = read_limits(config, loaded.max_position, ds_engine.module.config)
        runner, scheduler = _autotp_runner(ds_engine, config, limits, rank, device, clock)
    else:
        size = ds_engine.workspace.size
        limits = read_limits(config, loaded.max_position, ds_engine.module.config, size.tokens)
        runner, scheduler = _kernel_runner(ds_engine, config, limits, rank, device, clock)

    def make_text(request: Any) -> TextStream:
        return TextStream(loaded.tokenizer, request.stop.strings)

    grammars = GrammarCompiler(loaded.tokenizer, runner.vocabulary, loaded.eos_ids)
    launch = _sampler(runner, config, rank, device, clock)
    # On a CPU the host computes the steps themselves: nothing would run beside it.
    ahead = config.launch_ahead and device.type == "cuda"
    engine = Engine(runner, rank, make_text, loaded.eos_ids, grammars, observer, scheduler, launch, ahead)
    return engine, limits, grammars


def _idle_tokens(config: HandlerConfig, device: torch.device) -> int:
    """Most tokens of prompts in a step that no stream waits for. On a CPU a request that comes meanwhile would wait for
    seconds."""
    if config.max_batch_prefill_tokens != "auto":
        return config.max_batch_prefill_tokens
    return _IDLE_TOKENS if device.type == "cuda" else config.max_num_batched_tokens


def _autotp_runner(
    ds_engine: Any, config: HandlerConfig, limits: Limits, rank: RankInfo, device: torch.device, clock: LoadClock
) -> tuple[Runner, Scheduler]:
    module = ds_engine.module
    dtype = next(module.parameters()).dtype
    kept, needed = plan_kv_rows(module.config, config, limits, dtype, rank, device)
    with clock.phase("pack"):
        replaced = tune(module, config, rank, device)
    runner = ModelRunner(module, config.max_running, limits.max_model_len, device, kept)
    with clock.phase("warm-up"):
        _warm_up(runner, module, config, rank, device)
        if ds_engine.self_check is not None:
            error = verify_runner(runner, ds_engine.self_check)
            if rank.is_leader:
                logger.info("[dsserve] self-check: the engine's logits differ by %.1e", error)
    if rank.is_leader:
        logger.info(
            "[dsserve] %d slots of %d tokens and %d kept rows, KV cache up to %.2f GiB a rank, %s, %d thread(s) a rank",
            runner.slots, limits.max_model_len, kept, needed / 2**30, replaced, torch.get_num_threads(),
        )  # fmt: skip
    scheduler = Scheduler(
        runner.slots, PrefixCache(runner.slots, kept), config.max_num_batched_tokens, _idle_tokens(config, device),
        config.waiting_served_ratio, runner.forward.reads_by_span,
    )  # fmt: skip
    return runner, scheduler


def _kernel_runner(
    ds_engine: Any, config: HandlerConfig, limits: Limits, rank: RankInfo, device: torch.device, clock: LoadClock
) -> tuple[Runner, BatchScheduler]:
    """The kernels were proven where they were injected."""
    size = ds_engine.workspace.size
    runner = KernelRunner(ds_engine.module, size, limits.max_model_len, device)
    if config.warmup:
        with clock.phase("warm-up"):
            warm_up_batches(runner, rank.is_leader)
    if rank.is_leader:
        logger.info("[dsserve] kernel injection: batches of %d rows of %d tokens", size.rows, size.tokens)
    return runner, BatchScheduler(size.rows, size.tokens)


def _sampler(runner: Runner, config: HandlerConfig, rank: RankInfo, device: torch.device, clock: LoadClock) -> Launch:
    """On a GPU rank 0 samples there; on a CPU numpy is faster. The other ranks do not sample."""
    if device.type != "cuda" or not rank.is_leader:
        return HostChoice
    sampler = DeviceSampler(runner.slots, runner.vocabulary, device)
    if config.cuda_graphs:
        with clock.phase("warm-up"):
            # The model's graphs and the sampler's never run at the same time.
            sampler.capture(runner.graph_pool or torch.cuda.graph_pool_handle())
    return sampler.launch


def _warm_up(runner: ModelRunner, module: Any, config: HandlerConfig, rank: RankInfo, device: torch.device) -> None:
    if config.warmup:
        all_reduces = warm_up(runner, rank.is_leader)
        all_reduces += sum(part.sums_in_memory for part in module.modules() if isinstance(part, FusedLayer))
        if rank.is_leader:
            layers = module.config.get_text_config().num_hidden_layers
            logger.info("[dsserve] all-reduces in a decode step: %d for %d layers", all_reduces, layers)
    if config.cuda_graphs and device.type == "cuda":
        runner.capture_graphs(rank.is_leader, prefill=uses_decode_attention(module))
