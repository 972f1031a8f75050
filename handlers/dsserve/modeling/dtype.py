"""A model's dtype, without a second copy of the model: parameters are converted one at a time, buffers never.

The weights of a loaded model are pages of its files; a conversion as a whole would take the model's size of memory in
every rank. Buffers (rotary frequencies) are fp32 in transformers, whatever the model's dtype: rounded to bf16 they turn
the positions of a long prompt by whole radians.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# Bytes of a weight that are converted, or laid out anew by oneDNN, at a time.
_PIECE = 64 * 2**20


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the model computes in `dtype`, while its linear and embedding weights keep the dtype they have.

    All other parameters are converted for good.
    """
    hooks, linears, kept = [], [], set[int]()
    for module in model.modules():
        if type(module) is nn.Linear:
            linears.append(module)
            kept.add(id(module.weight))
            module.forward = partial(_multiply_in_pieces, module, dtype)  # type: ignore[method-assign]
        elif isinstance(module, nn.Embedding):
            kept.add(id(module.weight))
            hooks.append(module.register_forward_hook(lambda _, args, output: output.to(dtype)))
    convert_parameters(model, dtype, without=kept)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in linears:
            del module.forward


def _multiply_in_pieces(layer: nn.Linear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    rows = max(1, _PIECE // (layer.in_features * dtype.itemsize))
    output = torch.cat([F.linear(x, piece.to(dtype)) for piece in layer.weight.split(rows)], dim=-1)
    return output if layer.bias is None else output + layer.bias.to(dtype)


def convert_parameters(model: nn.Module, dtype: torch.dtype, without: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Converts the floating-point parameters one after the other, in place.

    Args:
        without: ids of parameters that stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and id(parameter) not in without:
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def without_deepspeeds_conversion() -> Iterator[None]:
    """Within the block `deepspeed.init_inference` (0.19.8) leaves dtypes alone; it has no setting for that.

    It would convert the whole model before it shards it, and the buffers with it.
    """
    from deepspeed.inference.engine import InferenceEngine

    original = InferenceEngine._convert_to_dtype
    InferenceEngine._convert_to_dtype = lambda *_: None
    try:
        yield
    finally:
        InferenceEngine._convert_to_dtype = original


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32
