"""Weight-only quantization of a rank's shards (`deepspeed.quantization`), by torchao.

Matrices of the layers are stored in 8 or 4 bits and multiplied in the model's dtype; embeddings, the LM head and norms
stay as they are. It happens after the sharding, on each rank's own part: a column-parallel shard has the scales of the
whole matrix, a row-parallel one has its own, as fine or finer. Does not quantize activations or the KV cache, and does
not read checkpoints that are quantized already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from dsserve.config.deepspeed import QUANTIZATION_KEY as KEY
from dsserve.config.deepspeed import QUANTIZATION_LIMITS as LIMITS
from dsserve.core.errors import LoadError
from dsserve.kernels import gpu_ops
from dsserve.modeling.linear import ShardedLinear, copy_into, replace_layers
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo

logger = logging.getLogger(__name__)

# Weights of a row that share a scale in int4.
INT4_GROUP = 32
# Output features that torch's int4 product on a CPU takes at a time; it refuses other numbers.
_CPU_INT4_STEP = 16
# Rows up to which a CPU multiplies int8 directly; more are faster with the weight expanded.
_CPU_INT8_ROWS = 16
# Input features that torch's direct product reads at a time: of other numbers it reads past the end of a row (2.13).
_CPU_INT8_STEP = 16
# Compute capability from which a GPU has fp8, and torch its int4 matmul.
_CAPABILITY = {"int8": (0, 0), "int4": (8, 0), "fp8": (8, 9)}


def check_device(mode: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses what the device or the library cannot do.

    Raises:
        LoadError: the mode needs another device or dtype, or torchao is not installed; the message says which.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _CAPABILITY[mode]:
            needed = ".".join(map(str, _CAPABILITY[mode]))
            has = ".".join(map(str, found))
            raise LoadError(f"{KEY}: {mode} needs a GPU of compute capability {needed}, this one has {has}; use int8")
    elif mode == "fp8":
        raise LoadError(f"{KEY}: fp8 needs a GPU of compute capability 8.9; use int8 on a CPU")
    if mode == "int4" and device.type == "cuda" and dtype is not torch.bfloat16:
        raise LoadError(f"{KEY}: a GPU multiplies int4 in bf16, the model's dtype is {name}; set deepspeed.dtype: bf16")
    if mode == "fp8" and dtype is torch.float32:
        raise LoadError(f"{KEY}: fp8 multiplies in bf16 or fp16, the model's dtype is {name}; set deepspeed.dtype")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of CUDA libraries that a CPU does not need
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise LoadError(f"{KEY}: {mode} needs torchao ({error}); install torchao==0.18.0") from None


def quantize_engine(
    module: Any, mode: str, check: SelfCheck | None, rank: RankInfo, device: torch.device
) -> SelfCheck | None:
    """Quantizes a sharded model's layers in place, and measures what that does to the logits.

    Returns:
        The check with the quantized model's logits: what the engine must reproduce. None without a check.

    Raises:
        LoadError: a shard of some rank that the mode cannot hold, or logits that changed more than its rounding
            explains.
    """
    layers = _quantize_on_all_ranks(module, mode, rank)
    if rank.is_leader:
        before, after = sum(layer.bytes_before for layer in layers), sum(layer.bytes for layer in layers)
        sizes = f"{after / 2**20:.0f} MiB a rank instead of {before / 2**20:.0f}"
        logger.info("[dsserve] %s: %d matmuls quantized, %s", mode, len(layers), sizes)
    if check is None:
        return None
    with torch.inference_mode():
        logits = module(input_ids=check.token_ids[None].to(device), use_cache=False).logits[0]
    error = check.error(logits)
    if not error <= LIMITS[mode]:
        raise LoadError(
            f"{KEY}: {mode} changed the logits by {error:.2f} (limit {LIMITS[mode]}); this model is not fit for it: "
            "use int8, or leave it out"
        )
    if rank.is_leader:
        logger.info("[dsserve] self-check: %s changes the logits by %.1e", mode, error)
    return replace(check, logits=logits.float().cpu())


def _quantize_on_all_ranks(module: Any, mode: str, rank: RankInfo) -> list[QuantizedLinear]:
    """`quantize_layers`; if one rank refuses, so do the others, which would wait for it."""
    layers, refusal = list[QuantizedLinear](), None
    try:
        layers = quantize_layers(module, mode)
    except LoadError as error:
        refusal = error
    if not agree_on_least(int(refusal is None), rank):
        raise refusal or LoadError(f"{KEY}: another rank's shards cannot be held in {mode}; its message has the sizes")
    return layers


def quantize_layers(module: Any, mode: str) -> list[QuantizedLinear]:
    """Replaces the row- and column-parallel layers, in place; returns what was made of them, siblings as one.

    Raises:
        LoadError: a shard that the mode cannot hold.
    """
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    layers: list[QuantizedLinear] = []

    def make(weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool) -> ShardedLinear:
        layers.append(QuantizedLinear(weight, bias, row_parallel, mode))
        return layers[-1]

    replace_layers(module, make, keep=head)
    return layers


class QuantizedLinear(ShardedLinear):
    """A rank's part of a layer with a weight of torchao's; see `ShardedLinear`. An empty one stays as it is.

    `bytes_before` and `bytes` are the weight's memory before and after.

    Raises:
        LoadError: int4 with a number of columns (or, on a CPU, rows) that its groups do not divide.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool, mode: str) -> None:
        self._mode = mode
        super().__init__(weight, bias, row_parallel)
        self.bytes_before, self.bytes = _bytes(weight), _bytes(self._weight)

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        self._scale: torch.Tensor | None = None  # [out], where there is a direct product
        if not weight.numel():
            return weight
        on_cpu = weight.device.type == "cpu"
        if self._mode == "int4":
            _check_int4_shape(weight, _CPU_INT4_STEP if on_cpu else 1)
        quantized = _QUANTIZE[self._mode](weight.contiguous())
        # torchao expands a weight of 8 bits for every product. Direct ones are ours on GPUs, and torch's on CPUs: int8,
        # fast in bf16 alone.
        if not on_cpu and self._mode != "int4":
            self._scale = quantized.scale.flatten().float()
        elif self._mode == "int8" and weight.dtype is torch.bfloat16 and weight.shape[1] % _CPU_INT8_STEP == 0:
            self._scale = quantized.scale.flatten().to(weight.dtype)
        return quantized

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.shape[:-1].numel()
        weight: Any = self._weight
        scale = self._scale
        if scale is not None and x.is_cuda and gpu_ops.is_loaded():
            return gpu_ops.multiply(x, weight.qdata, bias, out, scale)
        if scale is None or x.is_cuda or rows > _CPU_INT8_ROWS:
            return copy_into(out, F.linear(x, weight, bias))
        output = torch._weight_int8pack_mm(x.reshape(rows, -1), weight.qdata, scale)
        output = output.view(*x.shape[:-1], -1)
        return output if bias is None else output.add_(bias)

    def _multiply_gated(self, x: torch.Tensor) -> torch.Tensor | None:
        weight: Any = self._weight
        return None if self._scale is None else gpu_ops.multiply_gated(x, weight.qdata, self._scale)


def _check_int4_shape(weight: torch.Tensor, step: int) -> None:
    rows, columns = weight.shape
    if columns % INT4_GROUP or rows % step:
        raise LoadError(
            f"{KEY}: int4 stores {INT4_GROUP} columns with a scale, and rows by {step}; this rank's part of a layer is "
            f"[{rows}, {columns}]; use int8, or another torchrun.nproc-per-node"
        )


def _int8(weight: torch.Tensor) -> Any:
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerRow

    return Int8Tensor.from_hp(weight, granularity=PerRow())


def _fp8(weight: torch.Tensor) -> Any:
    from torchao.quantization import Float8Tensor
    from torchao.quantization.granularity import PerRow

    return Float8Tensor.from_hp(weight, float8_dtype=torch.float8_e4m3fn, granularity=PerRow())


def _int4(weight: torch.Tensor) -> Any:
    if weight.device.type == "cuda":
        from torchao.quantization import Int4TilePackedTo4dTensor as Int4
    else:
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor as Int4
    return Int4.from_hp(weight, [1, INT4_GROUP])


_QUANTIZE: dict[str, Callable[[torch.Tensor], Any]] = {"int8": _int8, "fp8": _fp8, "int4": _int4}


def _bytes(weight: Any) -> int:
    if not hasattr(weight, "tensor_data_names"):
        return int(weight.numel() * weight.element_size())
    names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", [])]
    parts = [getattr(weight, name, None) for name in names]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
