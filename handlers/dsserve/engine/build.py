"""Makes the engine of one rank from DeepSpeed's module: memory, packed weights, proof, warm-up.

AutoTP's module gets KV slots and continuous batching, one with injected kernels their batches. Refuses at load, with
the reason, what the engine could not do exactly. Does not load or shard the model and sets no limits (`limits`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dsserve.attention.decode import uses_decode_attention
from dsserve.config.exact_context import check_pass_tokens
from dsserve.config.handler import YAML_FILE, HandlerConfig
from dsserve.config.limits import read_limits
from dsserve.core.errors import LoadError, first_line
from dsserve.core.request import Limits
from dsserve.engine.batch_scheduler import BatchScheduler
from dsserve.engine.detokenizer import TextStream
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Observer
from dsserve.engine.scheduler import Scheduler
from dsserve.injection.workspace import WorkspaceSize
from dsserve.kv.prefix_cache import PrefixCache
from dsserve.loading.hf_model import LoadedModel
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.sharded_model import ShardedModel
from dsserve.modeling.dtype import model_dtype
from dsserve.modeling.fused_layers import FusedLayer
from dsserve.modeling.optimize import tune
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.base import Runner
from dsserve.runner.kernel_injection import KernelRunner
from dsserve.runner.kv_memory import measure_passes, plan_kv_rows
from dsserve.runner.long_check import LongCheck
from dsserve.runner.prefill_graphs import MOST_TOKENS
from dsserve.runner.warmup import verify_runner, warm_up, warm_up_batches
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.grammar import GrammarCompiler
from dsserve.sampling.pending import HostChoice, Launch

logger = logging.getLogger(__name__)

# About 0.1 s of a 7 billion parameter model on one H100.
_IDLE_TOKENS = 4096


def build_engine(
    sharded: ShardedModel,
    loaded: LoadedModel,
    config: HandlerConfig,
    rank: RankInfo,
    device: torch.device,
    clock: LoadClock,
    observer: Observer | None = None,
) -> tuple[Engine, Limits, GrammarCompiler]:
    """The engine of this rank, proven and warm, what requests may ask of it, and the maker of its grammars.

    Args:
        sharded: what `shard_model` returned; its self-check is repeated through the KV slots.
        observer: of rank 0's engine.

    Raises:
        LoadError: see `read_limits`, `plan_kv_rows` and `SelfCheck.verify`; a GPU without memory for all of it.
    """
    with _memory_errors_explained(config):
        if sharded.workspace is None:
            limits = read_limits(config, loaded.max_position, sharded.module.config)
            runner, scheduler = _autotp_runner(sharded, config, limits, rank, device, clock)
        else:
            size = sharded.workspace.size
            limits = read_limits(config, loaded.max_position, sharded.module.config, size.tokens)
            runner, scheduler = _kernel_runner(sharded.module, size, config, limits, rank, device, clock)
        limits = replace(limits, max_running=runner.slots)
        launch = _sampler(runner, config, rank, device, clock)

    def make_text(request: Any) -> TextStream:
        return TextStream(loaded.tokenizer, request.stop.strings)

    grammars = GrammarCompiler(loaded.tokenizer, runner.vocabulary, loaded.eos_ids)
    # On a CPU the host computes the steps themselves: nothing would run beside it.
    ahead = config.launch_ahead and device.type == "cuda"
    engine = Engine(runner, rank, make_text, loaded.eos_ids, grammars, observer, scheduler, launch, ahead)
    return engine, limits, grammars


@contextmanager
def _memory_errors_explained(config: HandlerConfig) -> Iterator[None]:
    """What runs out of a GPU's memory within is a LoadError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoadError(
            f"{YAML_FILE}: no GPU memory is left for the engine's passes and graphs ({first_line(error)}); lower "
            f"handler.kv_memory_fraction ({config.kv_memory_fraction:g}) or max_batch_prefill_tokens, set cuda_graphs: "
            "false, or use more ranks (with kernel injection lower max_running or deepspeed.max_out_tokens)"
        ) from None


def _idle_tokens(config: HandlerConfig, device: torch.device) -> int:
    """Most tokens of prompts in a step that no stream waits for. On a CPU a request that comes meanwhile would wait for
    seconds."""
    if config.max_batch_prefill_tokens != "auto":
        return config.max_batch_prefill_tokens
    return max(_IDLE_TOKENS if device.type == "cuda" else 0, config.max_num_batched_tokens)


def _autotp_runner(
    sharded: ShardedModel, config: HandlerConfig, limits: Limits, rank: RankInfo, device: torch.device, clock: LoadClock
) -> tuple[Runner, Scheduler]:
    module = sharded.module
    dtype = model_dtype(module)
    with clock.phase("self-check"):
        long = LongCheck.capture(module, sharded.self_check, limits.max_model_len, device)
    with clock.phase("pack"):
        replaced = tune(module, config, rank, device, MOST_TOKENS)
    idle_tokens = _idle_tokens(config, device)
    check_pass_tokens(module.config, idle_tokens + config.most_running)  # a pass may hold decoded rows, too
    memory = PrefillMemory(device, rank, module.config.get_text_config().vocab_size)
    with clock.phase("warm-up"):
        passes = measure_passes(module, config, limits, idle_tokens, memory)
        rows = plan_kv_rows(module.config, config, limits, dtype, rank, device, passes)
        runner = ModelRunner(module, rows.slots, limits.max_model_len, device, rows.kept, memory)
        _warm_up(runner, module, config, rank, device, idle_tokens)
        _prove(runner, sharded.self_check, long, rank)
    if rank.is_leader:
        logger.info(
            "[dsserve] %d slots of %d tokens and %d kept rows, KV cache up to %.2f GiB a rank beside %.2f for passes, "
            "%s, %d thread(s) a rank",
            rows.slots, limits.max_model_len, rows.kept, rows.nbytes / 2**30, passes / 2**30, replaced,
            torch.get_num_threads(),
        )  # fmt: skip
        if rows.slots < config.most_running:
            logger.warning(
                "[dsserve] the memory holds %d texts of %d tokens at a time, max_running: auto would take %d: a "
                "lower handler.max_model_len gives more", rows.slots, limits.max_model_len, config.most_running,
            )  # fmt: skip
    scheduler = Scheduler(
        rows.slots, PrefixCache(rows.slots, rows.kept), config.max_num_batched_tokens, idle_tokens,
        config.waiting_served_ratio, runner.forward.reads_by_span,
    )  # fmt: skip
    return runner, scheduler


def _prove(runner: ModelRunner, check: SelfCheck | None, long: LongCheck | None, rank: RankInfo) -> None:
    """The self-check again, through the KV slots."""
    if check is None:
        return
    error = max(verify_runner(runner, check), long.verify(runner) if long else 0.0)
    if rank.is_leader:
        logger.info("[dsserve] self-check: the engine's logits differ by %.1e", error)


def _kernel_runner(
    module: Any,
    size: WorkspaceSize,
    config: HandlerConfig,
    limits: Limits,
    rank: RankInfo,
    device: torch.device,
    clock: LoadClock,
) -> tuple[Runner, BatchScheduler]:
    """The kernels were proven where they were injected."""
    runner = KernelRunner(module, size, limits.max_model_len, device)
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


def _warm_up(
    runner: ModelRunner, module: Any, config: HandlerConfig, rank: RankInfo, device: torch.device, most: int
) -> None:
    captured = config.cuda_graphs and device.type == "cuda"
    if config.warmup:
        # What is captured runs once before it, whatever its number of rows.
        all_reduces = warm_up(runner, rank.is_leader, 1 if captured else runner.slots)
        all_reduces += sum(part.sums_in_memory for part in module.modules() if isinstance(part, FusedLayer))
        if rank.is_leader:
            layers = module.config.get_text_config().num_hidden_layers
            logger.info("[dsserve] all-reduces in a decode step: %d for %d layers", all_reduces, layers)
    if captured:
        runner.capture_graphs(rank.is_leader, most if uses_decode_attention(module) else 0)
