"""DeepSpeed's own weight quantization on the layers that `dsserve.modeling.quantization` quantizes: for comparison
alone.

Its `Quantizer` and `DeQuantizer` (deepspeed.inference.quantization), which its ZeRO-Inference uses on whole fp16 linear
layers; here around each rank's layers, in any dtype, with the groups of torchao: a row in int8, 32 weights in int4.
Nothing is served this way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dsserve.modeling.linear import ShardedLinear, copy_into, replace_layers
from dsserve.modeling.quantization import INT4_GROUP

PREFIX = "deepspeed-"


def quantize(module: Any, mode: str) -> list[DeepSpeedLinear]:
    """Replaces the row- and column-parallel layers in place; `mode` is `deepspeed-int8` or `deepspeed-int4`."""
    layers: list[DeepSpeedLinear] = []

    def make(weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool) -> ShardedLinear:
        layers.append(DeepSpeedLinear(weight, bias, row_parallel, int(mode.removeprefix(PREFIX + "int"))))
        return layers[-1]

    replace_layers(module, make, keep=module.get_output_embeddings())
    return layers


class DeepSpeedLinear(ShardedLinear):
    """A layer whose weight DeepSpeed expands to the model's dtype for every product; `bytes` is its memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool, bits: int) -> None:
        self._bits = bits
        super().__init__(weight, bias, row_parallel)
        self.bytes = sum(part.nbytes for part in (self._weight, self._scale, self._least))

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer

        group = INT4_GROUP if self._bits == 4 else weight.shape[1]
        config = {"num_bits": self._bits, "group_size": group, "group_dim": 1, "symmetric": False}
        self._dequantizer = DeQuantizer(config, weight.dtype)
        quantized, self._scale, self._least = Quantizer(config).quantize(weight)
        return quantized

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        weight = self._dequantizer.dequantize(self._weight, self._scale, self._least)
        return copy_into(out, F.linear(x, weight, bias))
