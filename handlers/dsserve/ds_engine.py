"""`get_ds_engine`: a loaded model in, a DeepSpeed inference engine out, sharded over the ranks and checked.

Reads the `deepspeed:` section of model-config.yaml, calls `deepspeed.init_inference` (AutoTP or kernel injection) and
compares the logits before and after. Does not generate (`generation`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ts.context import Context

from dsserve import checkpoint
from dsserve.config import YAML_FILE
from dsserve.distributed import RankInfo, all_cores, init_process_group, prepare_environment, select_device
from dsserve.errors import LoadError
from dsserve.hf_model import model_dtype
from dsserve.injection.inject import check_injection, inject_kernels
from dsserve.load_clock import LoadClock
from dsserve.precision import convert_parameters, without_deepspeeds_conversion
from dsserve.quantization import check_device, quantize_engine
from dsserve.self_check import SelfCheck
from dsserve.sharding.alibi import use_rank_alibi
from dsserve.sharding.heads import plan_kv_copies, repeat_kv_heads
from dsserve.sharding.phi3 import use_rank_query_heads

if TYPE_CHECKING:
    from dsserve.ds_config import DeepSpeedSettings
    from dsserve.shard_cache import Shards

logger = logging.getLogger(__name__)


def get_ds_engine(
    model: Any,
    ctx: Context,
    shards: Shards | None = None,
    clock: LoadClock | None = None,
    max_batch: int | None = None,
) -> Any:
    """Shards `model` as the `deepspeed:` section of model-config.yaml says.

    Args:
        model: a Hugging Face model on the CPU, whole in every rank, or on the meta device with `deepspeed.checkpoint`.
        ctx: TorchServe's context of the load.
        shards: a cache that fits `model`, which then lies on the meta device and gets its values from there.
        clock: what times the phases.
        max_batch: the largest batch that the kernels' workspace is taken for (kernel injection only); default:
            TorchServe's `batchSize`.

    Returns:
        DeepSpeed's `InferenceEngine`; `engine.module` is what a handler keeps. `engine.self_check` holds the reference
        logits (those of the quantized weights with `deepspeed.quantization`), None where the check is off, the model is
        no causal language model or came on the meta device without a cache.

    Raises:
        LoadError: settings that cannot work, a rank without attention heads, or logits that changed.
    """
    rank = RankInfo.from_env()
    device = select_device((ctx.model_yaml_config or {}).get("deviceType"), rank)
    if not torch.distributed.is_initialized():
        prepare_environment(device, rank)
        init_process_group(rank)
    # Imported here: it imports DeepSpeed, which reads the environment prepared above.
    from dsserve.ds_config import read_deepspeed_settings

    model_dir = Path(ctx.system_properties["model_dir"])
    settings = read_deepspeed_settings(ctx.model_yaml_config or {}, model_dir, rank.world_size, model_dtype(model))
    if settings.quantization:
        check_device(settings.quantization, settings.dtype, device)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if settings.kernel_inject:
        check_injection(model, settings, device)
    clock, check = clock or LoadClock(rank.rank, device), None
    if settings.self_check:
        with clock.phase("reference"):
            check = shards.reference if shards else _capture(model, settings.dtype, on_meta, rank)
    init = dict(settings.init)
    if settings.checkpoint:
        init["checkpoint"] = _prepare_checkpoint(model, ctx, settings.checkpoint, rank, model_dir, on_meta)
    with clock.phase("shard"):
        if settings.kernel_inject:
            engine = _inject(model, init, settings, max_batch or ctx.system_properties["batch_size"] or 1)
        else:
            engine = _shard(model, init, settings, rank)
        if shards:
            shards.fill(engine.module, rank.rank, device)
    with clock.phase("self-check"):
        checkpoint.check_nothing_on_meta(engine.module)
        checkpoint.check_finite(engine.module)
        engine.self_check = check
        _report(engine, rank, settings.tp_size, clock.seconds["shard"])
        if check:
            _verify(engine, check, rank, device)
    if settings.quantization:
        with clock.phase("quantize"):
            engine.self_check = quantize_engine(engine.module, settings.quantization, check, rank, device)
    return engine


def _capture(model: Any, dtype: torch.dtype, on_meta: bool, rank: RankInfo) -> SelfCheck | None:
    """The whole model's logits, computed on rank 0 alone while the others wait: they would only share its cores.

    Only what maps token ids to logits can be compared; a meta model has no reference.
    """
    if on_meta or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        return None
    found: list[SelfCheck | None] = [None]
    if rank.is_leader:
        with all_cores():
            found = [SelfCheck.capture(model, dtype)]
    if rank.world_size > 1:
        torch.distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


def _prepare_checkpoint(model: Any, ctx: Context, name: str, rank: RankInfo, model_dir: Path, on_meta: bool) -> str:
    """Writes the list of weight files on rank 0 alone and returns its path on every rank."""
    model_path = (ctx.model_yaml_config.get("handler") or {}).get("model_path")
    if not model_path:
        raise LoadError(f"{YAML_FILE}: deepspeed.checkpoint needs handler.model_path, the folder of the weights")
    files = checkpoint.find_bin_files(model_dir / model_path)
    if on_meta and plan_kv_copies(model, rank.world_size) > 1:
        raise LoadError(
            "deepspeed.checkpoint: the KV heads are too few for the ranks and cannot be repeated in a model made on "
            "the meta device; load it with from_pretrained, or lower torchrun.nproc-per-node"
        )
    destination = model_dir / name
    if rank.is_leader:
        checkpoint.write_checkpoint_list(files, destination)
    if rank.world_size > 1:
        torch.distributed.barrier()
    if on_meta:
        checkpoint.restore_buffers(model)
    return str(destination)


def _shard(model: Any, init: dict[str, Any], settings: DeepSpeedSettings, rank: RankInfo) -> Any:
    """DeepSpeed's engine; around AutoTP's split, what makes it right for every number of ranks (`sharding`)."""
    copies = repeat_kv_heads(model, settings.tp_size)
    if copies > 1 and rank.is_leader:
        logger.info("[dsserve] every KV head %d times, so that each rank has one", copies)
    with without_deepspeeds_conversion():
        engine = _init_inference(model, init, settings.dtype, settings.tp_size)
    convert_parameters(engine.module, settings.dtype)
    use_rank_alibi(engine.module, rank.rank, settings.tp_size)
    use_rank_query_heads(engine.module)
    return engine


def _inject(model: Any, init: dict[str, Any], settings: DeepSpeedSettings, rows: int) -> Any:
    """DeepSpeed's engine with kernels in place of the model's layers, for batches of up to `rows`."""
    convert_parameters(model, settings.dtype)  # the kernels' layers take the weights as they are

    def init_inference(model: Any, init: dict[str, Any]) -> Any:
        with without_deepspeeds_conversion():
            return _init_inference(model, init, settings.dtype, settings.tp_size)

    return inject_kernels(model, init, rows, init_inference)


def _init_inference(model: Any, init: dict[str, Any], dtype: torch.dtype, tp_size: int) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = {**init, "dtype": dtype}
    config["tensor_parallel"] = {**init.get("tensor_parallel", {}), "tp_size": tp_size}
    try:
        # DeepSpeed prints AutoTP's findings to stdout, which TorchServe parses.
        with contextlib.redirect_stdout(io.StringIO()):
            return deepspeed.init_inference(model, config=config)
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise LoadError(f"DeepSpeed refuses {type(model).__name__}: {error}") from error


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
def _verify(engine: Any, check: SelfCheck, rank: RankInfo, device: torch.device) -> None:
    try:
        logits = engine.module(input_ids=check.token_ids[None].to(device), use_cache=False).logits[0]
    except (RuntimeError, ValueError, IndexError) as error:  # parts that were not sharded alike do not fit together
        raise LoadError(
            f"{type(engine.module).__name__} cannot run after DeepSpeed's sharding over {rank.world_size} ranks "
            f"({str(error).splitlines()[0]}); this architecture is not served with this number of ranks"
        ) from error
    relative = check.verify(logits, "DeepSpeed's sharding")
    if rank.is_leader:
        logger.info("[dsserve] self-check: logits differ by %.1e from the unsharded model's", relative)
