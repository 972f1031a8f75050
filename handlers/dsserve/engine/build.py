"""Makes the engine of one rank from DeepSpeed's module: memory, packed weights, proof, warm-up.

AutoTP's module gets pages and continuous batching, one with injected kernels their batches. Refuses at load, with
the reason, what the engine could not do exactly. Does not load or shard the model and sets no limits (`limits`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsserve.config.exact_context import check_pass_tokens
from dsserve.config.handler import YAML_FILE, HandlerConfig
from dsserve.config.limits import make_limits, read_context
from dsserve.core.errors import LoadError, first_line
from dsserve.core.request import Limits
from dsserve.core.step_input import EXACT_ROWS
from dsserve.engine.batch_scheduler import BatchScheduler
from dsserve.engine.detokenizer import TextStream
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Observer
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.token_budget import TokenBudget
from dsserve.kv.manager import KVManager
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
from dsserve.runner.kv_memory import measure_passes, plan_kv
from dsserve.runner.long_check import LongCheck
from dsserve.runner.step_graphs import MOST_TOKENS
from dsserve.runner.warmup import verify_runner, warm_up, warm_up_batches
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.grammar import GrammarCompiler
from dsserve.sampling.pending import HostChoice, Launch

logger = logging.getLogger(__name__)


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
        sharded: what `shard_model` returned; its self-check is repeated through the KV cache.
        observer: of rank 0's engine.

    Raises:
        LoadError: see `read_context`, `plan_kv` and `SelfCheck.verify`; a GPU without memory for all of it.
    """
    workspace = sharded.workspace
    out_tokens = None if workspace is None else workspace.size.tokens
    length = read_context(config, loaded.max_position, sharded.module.config, out_tokens)
    make_runner = _autotp_runner if workspace is None else _kernel_runner
    runner: Runner
    with _memory_errors_explained(config):
        runner, scheduler = make_runner(sharded, config, length, rank, device, clock)
        launch = _sampler(runner, config, rank, device, clock)

    def make_text(request: Any) -> TextStream:
        return TextStream(loaded.tokenizer, request.stop.strings)

    grammars = GrammarCompiler(loaded.tokenizer, runner.vocabulary, loaded.eos_ids)
    # On a CPU the host computes the steps themselves: nothing would run beside it.
    ahead = config.launch_ahead and device.type == "cuda" and workspace is None
    engine = Engine(runner, rank, make_text, loaded.eos_ids, scheduler, grammars, observer, launch, ahead)
    return engine, make_limits(config, length, runner.rows), grammars


@contextmanager
def _memory_errors_explained(config: HandlerConfig) -> Iterator[None]:
    """What runs out of a GPU's memory within is a LoadError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoadError(
            f"{YAML_FILE}: no GPU memory is left for the engine's passes and graphs ({first_line(error)}); lower "
            f"handler.kv_memory_fraction ({config.kv_memory_fraction:g}) or max_num_batched_tokens, set cuda_graphs: "
            "false, or use more ranks (with kernel injection lower max_running or deepspeed.max_out_tokens)"
        ) from None


def _autotp_runner(
    sharded: ShardedModel, config: HandlerConfig, length: int, rank: RankInfo, device: torch.device, clock: LoadClock
) -> tuple[ModelRunner, Scheduler]:
    module = sharded.module
    dtype = model_dtype(module)
    with clock.phase("self-check"):
        long = LongCheck.capture(module, sharded.self_check, length, device)
    with clock.phase("pack"):
        replaced = tune(module, config, rank, device, MOST_TOKENS)
    budget = TokenBudget(*config.step_tokens(device.type, _memory_gib(device)), config.waiting_served_ratio)
    check_pass_tokens(module.config, budget.step + config.rows(device.type))  # a pass may hold decoded rows, too
    memory = PrefillMemory(device, rank, module.config.get_text_config().vocab_size)
    with clock.phase("warm-up"):
        passes = measure_passes(module, config, length, budget.step, rank, memory)
        plan = plan_kv(module.config, config, length, dtype, rank, device, passes)
        runner = ModelRunner(module, plan.size, rank, device, memory)
        _warm_up(runner, module, config, rank, device, budget.step)
        _prove(runner, sharded.self_check, long, rank)
    if rank.is_leader:
        logger.info(
            "[dsserve] KV cache: %d tokens, %.1f texts of %d, in pages of %d, %.2f GiB a rank beside %.2f for passes; "
            "up to %d texts at a time; %s, %s attention, %d thread(s) a rank",
            plan.tokens, plan.tokens / length, length, plan.size.page_tokens, plan.nbytes / 2**30, passes / 2**30,
            plan.size.rows, replaced, "paged" if runner.is_packed else "torch's", torch.get_num_threads(),
        )  # fmt: skip
    kv = KVManager(plan.size.pages, plan.size.page_tokens, config.enable_prefix_caching)
    return runner, Scheduler(plan.size.rows, kv, budget)


def _memory_gib(device: torch.device) -> float:
    """A GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0


def _prove(runner: ModelRunner, check: SelfCheck | None, long: LongCheck | None, rank: RankInfo) -> None:
    """The self-check again, through the KV cache."""
    if check is None:
        return
    error = max(verify_runner(runner, check), long.verify(runner) if long else 0.0)
    if rank.is_leader:
        logger.info("[dsserve] self-check: the engine's logits differ by %.1e", error)


def _kernel_runner(
    sharded: ShardedModel, config: HandlerConfig, length: int, rank: RankInfo, device: torch.device, clock: LoadClock
) -> tuple[KernelRunner, BatchScheduler]:
    """The kernels were proven where they were injected."""
    assert sharded.workspace is not None
    size = sharded.workspace.size
    runner = KernelRunner(sharded.module, size, length, rank, device)
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
    sampler = DeviceSampler(runner.rows, runner.vocabulary, device)
    if config.cuda_graphs:
        with clock.phase("warm-up"):
            # The model's graphs and the sampler's never run at the same time.
            sampler.capture(runner.graph_pool or torch.cuda.graph_pool_handle())
    return sampler.launch


def _warm_up(
    runner: ModelRunner, module: Any, config: HandlerConfig, rank: RankInfo, device: torch.device, tokens: int
) -> None:
    captured = config.cuda_graphs and device.type == "cuda"
    if config.warmup:
        # What is captured runs once before it, whatever its number of rows.
        all_reduces = warm_up(runner, rank.is_leader, 1 if captured else min(runner.rows, EXACT_ROWS))
        all_reduces += sum(part.sums_in_memory for part in module.modules() if isinstance(part, FusedLayer))
        if rank.is_leader:
            layers = module.config.get_text_config().num_hidden_layers
            logger.info("[dsserve] all-reduces in a decode step: %d for %d layers", all_reduces, layers)
    if captured:
        runner.capture_graphs(rank.is_leader, tokens)
