"""CPU only: DeepSpeed's sharded linear layers on oneDNN weights that are laid out once, at load.

A plain matmul lays the weight out anew on every call; at one row that is half of its time. Columns that read the same
input (q, k, v; gate, up) become one matmul. The layers' sharding and all-reduces stay DeepSpeed's, the LM head's is
ours (`vocab_head`). Where the private oneDNN operators are missing nothing is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsserve.distributed import all_reduce
from dsserve.vocab_head import VocabParallelHead, gather_rows

# Siblings that transformers' layers feed with the same tensor, in the order in which they are called.
_FUSED_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def can_pack(module: nn.Module) -> bool:
    """Whether oneDNN's packed linear runs here, in the module's dtype: tried on one small matrix."""
    weight = torch.eye(16, dtype=next(module.parameters()).dtype)
    try:
        return bool(torch.allclose(PackedLinear(weight, None, False)(weight), weight))
    except (RuntimeError, AttributeError):
        return False


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with a prepacked weight.

    Args:
        weight: `[out, in]`, this rank's shard; empty where DeepSpeed gave this rank none of a narrow layer.
        bias: `[out]` or None. Of a row-parallel layer it is added once, after the sum.
        row_parallel: sum the result over the ranks.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool) -> None:
        super().__init__()
        self._rows = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous()) if weight.numel() else None
        self._bias = None if bias is None else bias.detach()
        self._row_parallel = row_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        bias = None if self._row_parallel else self._bias
        if self._packed is None:
            output = x.new_zeros(*x.shape[:-1], self._rows)
        else:
            output = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, bias, "none", [], "")
        if not self._row_parallel:
            return output
        all_reduce(output)
        return output if self._bias is None else output.add_(self._bias)


class _FusedColumns:
    """Several column-parallel layers as one matmul; computed when the first part is asked for, then handed out."""

    def __init__(self, layers: list[Any]) -> None:
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        self._sizes = [layer.weight.shape[0] for layer in layers]
        self._linear = PackedLinear(torch.cat([layer.weight.detach() for layer in layers]), bias, False)
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x:
            self._input, self._outputs = x, self._linear(x).split(self._sizes, dim=-1)
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outputs = None, ()
        return output


class _FusedPart(nn.Module):
    """One of the layers that were fused; what the model calls in its place."""

    def __init__(self, columns: _FusedColumns, index: int) -> None:
        super().__init__()
        self._columns = columns
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._columns.part(self._index, x)


def pack_weights(module: nn.Module) -> int:
    """Replaces the linear layers of a sharded module, in place, and returns how many matmuls are packed.

    The original weights are dropped with their layers. All ranks must call it.
    """
    count = 0
    for parent in list(module.modules()):
        for names in _FUSED_SIBLINGS:
            count += _fuse(parent, names)
        for name, child in list(parent.named_children()):
            packed = _pack(child)
            if packed is not None:
                setattr(parent, name, packed)
                count += 1
    return count


def _fuse(parent: nn.Module, names: tuple[str, ...]) -> int:
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    if any(_kind(layer) != "column" for layer in layers):
        return 0
    if len({layer.bias is None for layer in layers}) != 1:
        return 0
    columns = _FusedColumns(layers)
    for index, name in enumerate(names):
        setattr(parent, name, _FusedPart(columns, index))
    return 1


def _pack(child: Any) -> nn.Module | None:
    kind = _kind(child)
    if kind is None:
        return None
    if kind == "head":
        weight, bias, start = gather_rows(child)
        return VocabParallelHead(PackedLinear(weight, bias, False), start, child.weight.shape[0])
    return PackedLinear(child.weight, child.bias, kind == "row" and child.is_tp_parallel)


def _kind(layer: Any) -> str | None:
    """`column`, `row` or `head` for the layers whose forward pass we know exactly, None for all others."""
    from deepspeed.module_inject import layers

    kinds: dict[type, str] = {
        nn.Linear: "column",  # one rank alone: nothing is sharded
        layers.LinearLayer: "column",
        layers.LinearAllreduce: "row",
        layers.LmHeadLinearAllreduce: "head",
    }
    kind = kinds.get(type(layer))
    if kind == "column" and getattr(layer, "gather_output", False):
        return None
    return kind
