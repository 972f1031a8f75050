"""A loaded model in, a `ShardedModel` out: sharded over the ranks by DeepSpeed, and checked.

Reads the `deepspeed:` section of model-config.yaml, calls `deepspeed.init_inference` (AutoTP or kernel injection) and
compares the logits before and after. Does not generate (`engine`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ts.context import Context

from dsserve.config.handler import YAML_FILE
from dsserve.core.errors import LoadError, first_line
from dsserve.injection.attempt import KernelInjection
from dsserve.loading import checkpoint
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.load_failure import is_of_the_machine
from dsserve.loading.sharded_model import ShardedModel
from dsserve.modeling import self_check
from dsserve.modeling.dtype import convert_parameters, model_dtype, without_deepspeeds_conversion
from dsserve.modeling.quantization import check_device, quantize_engine
from dsserve.modeling.self_check import SelfCheck, answers
from dsserve.parallel.alibi import use_rank_alibi
from dsserve.parallel.experts import LayerWeights
from dsserve.parallel.kv_heads import plan_kv_copies, repeat_kv_heads
from dsserve.parallel.phi3 import use_rank_query_heads
from dsserve.parallel.process_group import init_process_group
from dsserve.parallel.rank import RankInfo, many_cores, prepare_environment, select_device

if TYPE_CHECKING:
    from dsserve.config.deepspeed import DeepSpeedSettings
    from dsserve.loading.shard_cache import Shards

logger = logging.getLogger(__name__)


def get_ds_engine(model: Any, ctx: Context, max_batch: int | None = None) -> Any:
    """`shard_model` for a handler of one's own: DeepSpeed's `InferenceEngine`, of which it keeps `engine.module`."""
    return shard_model(model, ctx, max_batch=max_batch).engine


def shard_model(
    model: Any, ctx: Context, shards: Shards | None = None, clock: LoadClock | None = None, max_batch: int | None = None
) -> ShardedModel:
    """Shards `model` as the `deepspeed:` section of model-config.yaml says.

    Args:
        model: a Hugging Face model on the CPU, whole in every rank, or on the meta device with `deepspeed.checkpoint`.
        ctx: TorchServe's context of the load.
        shards: a cache that fits `model`, which then lies on the meta device and gets its values from there.
        clock: what times the phases.
        max_batch: the largest batch that the kernels' workspace is taken for (kernel injection only); default:
            TorchServe's `batchSize`.

    Raises:
        LoadError: settings that cannot work, a rank without attention heads, or logits that changed.
    """
    load = _begin(model, ctx, shards, clock)
    settings, rank, device = load.settings, load.rank, load.device
    injection = KernelInjection(settings, rank, device) if settings.kernel_inject else None
    injects = injection is not None and injection.is_possible(model)
    check, injected = None, None
    if settings.self_check:
        with load.clock.phase("reference"):
            check = shards.reference if shards else _capture(model, settings, load.on_meta, rank, injects)
    if injection and injects:
        rows = max_batch or ctx.system_properties["batch_size"] or 1
        with load.clock.phase("inject"):
            injected = injection.inject(model, rows, check, lambda model, init: _init_inference(model, init, settings))
    engine, workspace = injected or (_autotp(load, model, check), None)
    refused = injection.refusal if injection else None
    if refused and rank.is_leader:
        logger.warning("[dsserve] AutoTP instead of kernel injection: %s", refused)
    if settings.quantization:
        with load.clock.phase("quantize"):
            check = quantize_engine(engine.module, settings.quantization, check, rank, device)
    return ShardedModel(engine, check, workspace, refused)


def _begin(model: Any, ctx: Context, shards: Shards | None, clock: LoadClock | None) -> _Load:
    """The process group, unless there is one, and the settings, checked."""
    rank = RankInfo.from_env()
    yaml_config = ctx.model_yaml_config or {}
    device = select_device(yaml_config.get("deviceType"), rank)
    if not torch.distributed.is_initialized():
        prepare_environment(device, rank, (yaml_config.get("handler") or {}).get("num_threads"))
        init_process_group(rank)
    settings = read_settings(ctx, rank.world_size, model_dtype(model))
    if settings.quantization:
        check_device(settings.quantization, settings.dtype, device)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return _Load(ctx, settings, rank, device, clock or LoadClock(rank.rank, device), shards, on_meta)


def read_settings(ctx: Context, world_size: int, dtype: torch.dtype) -> DeepSpeedSettings:
    """The `deepspeed:` settings of a load, for a model in `dtype`; see `read_deepspeed_settings`."""
    # Imported here: it imports DeepSpeed, which reads the environment that the base handler prepares.
    from dsserve.config.deepspeed import read_deepspeed_settings

    model_dir = Path(ctx.system_properties["model_dir"])
    return read_deepspeed_settings(ctx.model_yaml_config or {}, model_dir, world_size, dtype)


@dataclass(frozen=True)
class _Load:
    """What one load goes by, whatever the model."""

    ctx: Context
    settings: DeepSpeedSettings
    rank: RankInfo
    device: torch.device
    clock: LoadClock
    shards: Shards | None
    on_meta: bool


def _autotp(load: _Load, model: Any, check: SelfCheck | None) -> Any:
    """DeepSpeed's engine with the model's own layers, each rank with its part, complete and proven."""
    settings, rank = load.settings, load.rank
    init = {**settings.init, "replace_with_kernel_inject": False}
    if settings.checkpoint:
        init["checkpoint"] = _prepare_checkpoint(load, model, settings.checkpoint)
    whole = LayerWeights.of(model)
    with load.clock.phase("shard"):
        engine = _shard(model, init, settings, rank)
        if load.shards:
            load.shards.fill(engine.module, rank.rank, load.device)
    with load.clock.phase("self-check"):
        self_check.check_nothing_on_meta(engine.module)
        self_check.check_finite(engine.module)
        _report(engine, rank, settings.tp_size, load.clock.seconds["shard"])
        if rank.is_leader:
            whole.warn_of_whole_experts(engine.module, settings.tp_size)
        if check:
            _verify(engine, check, rank)
    return engine


def _capture(model: Any, settings: DeepSpeedSettings, on_meta: bool, rank: RankInfo, injects: bool) -> SelfCheck | None:
    """The whole model's answers, computed on rank 0 alone while the others wait: they would only share its cores.

    Of AutoTP models only what maps token ids to logits is compared; a meta model has no reference. Kernels are compared
    with fp32: they round elsewhere than the model's own operations.
    """
    is_causal = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if on_meta or not (is_causal or injects):
        return None
    reference = torch.float32 if injects else settings.dtype
    found: list[SelfCheck | None] = [None]
    if rank.is_leader:
        with many_cores():
            found = [SelfCheck.capture(model, settings.dtype, reference)]
    if rank.world_size > 1:
        torch.distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


def _prepare_checkpoint(load: _Load, model: Any, name: str) -> str:
    """Writes the list of weight files on rank 0 alone and returns its path on every rank."""
    rank, model_dir = load.rank, Path(load.ctx.system_properties["model_dir"])
    model_path = (load.ctx.model_yaml_config.get("handler") or {}).get("model_path")
    if not model_path:
        raise LoadError(f"{YAML_FILE}: deepspeed.checkpoint needs handler.model_path, the folder of the weights")
    files = checkpoint.find_bin_files(model_dir / model_path)
    if load.on_meta and plan_kv_copies(model, rank.world_size) > 1:
        raise LoadError(
            "deepspeed.checkpoint: the KV heads are too few for the ranks and cannot be repeated in a model made on "
            "the meta device; load it with from_pretrained, or lower torchrun.nproc-per-node"
        )
    destination = model_dir / name
    if rank.is_leader:
        checkpoint.write_checkpoint_list(files, destination)
    if rank.world_size > 1:
        torch.distributed.barrier()
    if load.on_meta:
        checkpoint.restore_buffers(model)
    return str(destination)


def _shard(model: Any, init: dict[str, Any], settings: DeepSpeedSettings, rank: RankInfo) -> Any:
    """DeepSpeed's engine; around AutoTP's split, what makes it right for every number of ranks (`parallel`)."""
    copies = repeat_kv_heads(model, settings.tp_size)
    if copies > 1 and rank.is_leader:
        logger.info("[dsserve] every KV head %d times, so that each rank has one", copies)
    engine = _init_inference(model, init, settings)
    convert_parameters(engine.module, settings.dtype)
    use_rank_alibi(engine.module, rank.rank, settings.tp_size)
    use_rank_query_heads(engine.module)
    return engine


def _init_inference(model: Any, init: dict[str, Any], settings: DeepSpeedSettings) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = {**init, "dtype": settings.dtype}
    config["tensor_parallel"] = {**init.get("tensor_parallel", {}), "tp_size": settings.tp_size}
    try:
        # DeepSpeed prints AutoTP's findings to stdout, which TorchServe parses.
        with contextlib.redirect_stdout(io.StringIO()), without_deepspeeds_conversion():
            return deepspeed.init_inference(model, config=config)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise LoadError(
            f"DeepSpeed refuses {type(model).__name__} on {settings.tp_size} rank(s): {type(error).__name__}: "
            f"{first_line(error)}; use another number of ranks (torchrun.nproc-per-node), or another model"
        ) from error


def _report(engine: Any, rank: RankInfo, tp_size: int, seconds: float) -> None:
    logger.info("[dsserve] rank %d of %d: sharded by DeepSpeed in %.1f s", rank.rank, tp_size, seconds)
    for name, shape in shard_shapes(engine.module).items():
        logger.info("[dsserve] rank %d: %s %s", rank.rank, name, shape)


def shard_shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """Name -> shape of the linear weights of the first layer, this rank's shard `[out, in]`."""
    shapes = {}
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if ".0." in name and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            shapes[name] = list(weight.shape)
    return shapes


@torch.inference_mode()
def _verify(engine: Any, check: SelfCheck, rank: RankInfo) -> None:
    try:
        logits = answers(engine.module, check.token_ids)
    except Exception as error:  # parts that were not sharded alike do not fit together
        if is_of_the_machine(error):
            raise
        raise LoadError(
            f"{type(engine.module).__name__} cannot run after DeepSpeed's sharding over {rank.world_size} ranks "
            f"({first_line(error)}); this architecture is not served with this number of ranks"
        ) from error
    relative = check.verify(logits, "DeepSpeed's sharding")
    if rank.is_leader:
        logger.info("[dsserve] self-check: logits differ by %.1e from the unsharded model's", relative)
