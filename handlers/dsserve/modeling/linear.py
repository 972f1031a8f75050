"""DeepSpeed's sharded linear layers with fewer, larger matmuls, and on CPUs with weights that are laid out once.

Columns that read the same input (q, k, v; gate, up) become one matmul. On a CPU a plain matmul lays the weight out anew
on every call, at one row half of its time, so oneDNN packs it at load; where its private operators are missing nothing
is changed. The layers' sharding and all-reduces stay DeepSpeed's, the LM head's is ours (`vocab_head`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsserve.kernels import gpu_ops
from dsserve.parallel.collectives import all_reduce
from dsserve.parallel.rank_sum import RankSum
from dsserve.parallel.vocab_head import VocabParallelHead, gather_rows

# Siblings that transformers' layers feed with the same tensor, in the order in which they are called.
_FUSED_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def can_pack(module: nn.Module) -> bool:
    """Whether the replaced layers run here, on a CPU in the module's dtype: tried on one small matrix."""
    parameter = next(module.parameters())
    if parameter.device.type != "cpu":
        return True
    weight = torch.eye(16, dtype=parameter.dtype)
    try:
        return bool(torch.allclose(PackedLinear(weight, None, False)(weight), weight))
    except (RuntimeError, AttributeError):
        return False


class ShardedLinear(nn.Module):
    """`x @ weight.T + bias` of one rank's part of a layer.

    Args:
        weight: `[out, in]`, this rank's shard; empty where DeepSpeed gave this rank none of a narrow layer.
        bias: `[out]` or None. Of a row-parallel layer it is added once, after the sum.
        row_parallel: sum the result over the ranks.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool) -> None:
        super().__init__()
        self.in_features = weight.shape[-1]
        self._weight = self._lay_out(weight.detach())
        self._bias = None if bias is None else bias.detach()
        self._row_parallel = row_parallel
        self._rank_sum: RankSum | None = None

    def can_leave_sum(self, world_size: int) -> bool:
        """Whether a sum over the ranks is the last thing that the layer does; one rank has none to do."""
        return self._bias is None if self._row_parallel else world_size == 1

    def leave_sum_to(self, rank_sum: RankSum) -> None:
        """From now on a row-parallel layer's result is this rank's part alone, for `rank_sum`."""
        self._rank_sum = rank_sum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        if not self._row_parallel:
            return self._multiply(x, self._bias)
        if self._rank_sum is not None:
            return self._multiply(x, None, self._rank_sum.take(x.shape[:-1].numel()))
        output = all_reduce(self._multiply(x, None))
        return output if self._bias is None else output.add_(self._bias)

    def multiply_gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """`silu(a) * b` of the result's halves a and b, `[..., in]` -> `[..., out / 2]`; None where that is no single
        operation."""
        can = x.is_cuda and gpu_ops.is_loaded() and self._bias is None and not self._row_parallel
        return self._multiply_gated(x) if can and self._weight.numel() else None

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def _multiply_gated(self, x: torch.Tensor) -> torch.Tensor | None:
        return gpu_ops.multiply_gated(x, self._weight)

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`, in the memory `out`, `[n, out]`, where there is some."""
        if x.is_cuda and gpu_ops.is_loaded() and self._weight.numel():
            return gpu_ops.multiply(x, self._weight, bias, out)
        return copy_into(out, F.linear(x, self._weight, bias))


class PackedLinear(ShardedLinear):
    """The same on a CPU, with oneDNN's layout of the weight."""

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        self._rows, self._is_empty = weight.shape[0], weight.numel() == 0
        return weight if self._is_empty else torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._is_empty:
            return x.new_zeros(*x.shape[:-1], self._rows)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, bias, "none", [], "")


def copy_into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """`result` `[..., out]`, in the memory `[n, out]` where there is some."""
    return result if out is None else out.copy_(result.view(out.shape)).view(result.shape)


def _make_linear(weight: torch.Tensor, bias: torch.Tensor | None, row_parallel: bool) -> ShardedLinear:
    kind = PackedLinear if weight.device.type == "cpu" else ShardedLinear
    return kind(weight, bias, row_parallel)


# (weight [out, in], bias [out] or None, row_parallel) -> the layer
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None, bool], ShardedLinear]


class _FusedColumns:
    """Several column-parallel layers as one matmul; computed when the first part is asked for, then handed out."""

    def __init__(self, layers: list[Any], make: MakeLinear) -> None:
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        self._sizes = [layer.weight.shape[0] for layer in layers]
        self.in_features = layers[0].weight.shape[-1]
        self._linear = make(torch.cat([layer.weight.detach() for layer in layers]), bias, False)
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def multiply_gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `ShardedLinear`, of two parts that are as long."""
        return self._linear.multiply_gated(x) if self._sizes == self._sizes[:1] * 2 else None

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x:
            self._input, self._outputs = x, self._linear(x).split(self._sizes, dim=-1)
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outputs = None, ()
        return output


class FusedPart(nn.Module):
    """One of the layers that were fused; what the model calls in its place."""

    def __init__(self, columns: _FusedColumns, index: int) -> None:
        super().__init__()
        self.in_features = columns.in_features
        self._columns = columns
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._columns.part(self._index, x)

    def multiply_gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `ShardedLinear`: of this part, the gate, and its sibling."""
        return self._columns.multiply_gated(x) if self._index == 0 else None


def pack_weights(module: nn.Module) -> int:
    """Replaces the linear layers of a sharded module, in place, and returns how many matmuls are packed.

    The original weights are dropped with their layers. All ranks must call it.
    """
    return replace_layers(module, _make_linear) + _pack_heads(module)


def replace_layers(module: nn.Module, make: MakeLinear, keep: nn.Module | None = None) -> int:
    """Replaces the row- and column-parallel layers by what `make` makes of them, siblings as one; returns how many
    matmuls that are.

    Args:
        keep: a layer that stays as it is.
    """
    count, made = 0, dict[nn.Module, ShardedLinear]()  # a layer may have several parents
    for parent in list(module.modules()):
        for names in _FUSED_SIBLINGS:
            count += _fuse(parent, names, make)
        for name, child in _children(parent):
            kind = _kind(child)
            if kind in ("column", "row") and child is not keep and not _reads_weight(parent, name):
                if child not in made:
                    made[child] = make(child.weight, child.bias, kind == "row" and child.is_tp_parallel)
                    _drop(child)
                setattr(parent, name, made[child])
    return count + len(made)


def _fuse(parent: nn.Module, names: tuple[str, ...], make: MakeLinear) -> int:
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    if any(_kind(layer) != "column" for layer in layers) or any(_reads_weight(parent, name) for name in names):
        return 0
    if len({layer.bias is None for layer in layers}) != 1:
        return 0
    columns = _FusedColumns(layers, make)
    for index, name in enumerate(names):
        setattr(parent, name, FusedPart(columns, index))
    _drop(*layers)
    return 1


def _reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether a layer's code asks a part for its weight or bias itself (a router that asks for the dtype): what
    replaces parts has none."""
    kind: Any = type(parent)  # hashable, which mypy does not see of a module's class
    return name in _parts_read(kind)


@cache
def _parts_read(kind: Any) -> frozenset[str]:
    """The parts whose weight or bias a class's own code reads."""
    try:
        return frozenset(re.findall(r"\bself\.(\w+)\.(?:weight|bias)\b", inspect.getsource(kind)))
    except (OSError, TypeError):  # a class without a file
        return frozenset()


def _pack_heads(module: nn.Module) -> int:
    count = 0
    for parent in list(module.modules()):
        for name, child in _children(parent):
            if _kind(child) == "head":
                weight, bias, start = gather_rows(child)
                head = VocabParallelHead(_make_linear(weight, bias, False), start, child.weight.shape[0])
                setattr(parent, name, head)
                _drop(child)
                count += 1
    return count


def _drop(*layers: nn.Module) -> None:
    """Frees replaced layers' parameters. DeepSpeed's know their layer, which holds them: until Python looks for garbage
    they would lie beside what replaces them. A GPU gets their memory back at once: else what replaces the next layer is
    put there, and what it leaves of it (2.0 GiB beside 30 layers of Llama 70B on one H100) nobody else can have."""
    for layer in layers:
        for name, _ in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
    torch.cuda.empty_cache()


def _children(parent: nn.Module) -> list[tuple[str, Any]]:
    return list(parent.named_children())


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
