"""Layers with fused additions and norms give the layers' own logits, others are left alone. The kernel is torch's."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dsserve.core.errors import LoadError
from dsserve.modeling.fused_layers import FusedLayer, can_fuse_layers, use_fused_layers
from dsserve.modeling.fused_ops import FusedRMSNorm
from dsserve.modeling.linear import ShardedLinear, replace_layers
from dsserve.parallel import rank_sum
from dsserve.parallel.rank_sum import RankSum
from dsserve.parallel.symmetric_memory import Peers

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "pad_token_id": 0,
}  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Kernel:
    """In the Triton kernel's place."""

    calls = 0

    @classmethod
    def add_norm(
        cls, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, peers: Peers | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cls.calls += 1
        total = residual + (part if peers is None else part + peers.places[: len(part)])
        return total, rms_norm(total, weight, eps)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> type[Kernel]:
    monkeypatch.setitem(sys.modules, "dsserve.parallel.rank_sum_triton", Kernel)  # type: ignore[misc]
    monkeypatch.setattr(Kernel, "calls", 0)
    return Kernel


def make_model(family: str, fused_norms: bool = True) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    replace_layers(model, lambda weight, bias, row: ShardedLinear(weight, bias, False))
    for parent in list(model.modules()) if fused_norms else []:
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                ops = SimpleNamespace(rms_norm=rms_norm)
                setattr(parent, name, FusedRMSNorm(ops, child.weight, child.variance_epsilon))
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_logits_are_the_same(family: str, kernel: type[Kernel]) -> None:
    model = make_model(family)
    tokens = torch.randint(99, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens, use_cache=False).logits
    assert can_fuse_layers(model, 1)
    assert use_fused_layers(model, (RankSum(1, None), RankSum(1, None))) == 3
    for _ in range(2):
        found = model(input_ids=tokens, use_cache=False).logits
        assert torch.allclose(found, expected, atol=1e-4)
    assert expected.abs().max() > 1 and kernel.calls == 2 * 2 * 3
    assert len(list(model.parameters())) == len({id(parameter) for parameter in model.parameters()})


@pytest.mark.parametrize("family", ["phi3", "granite", "gemma2", "opt"])
def test_layers_of_another_form_are_left_alone(family: str) -> None:
    config = AutoConfig.for_model(family, **SHAPE)
    assert not can_fuse_layers(AutoModelForCausalLM.from_config(config), 1)


def test_norms_and_matmuls_must_be_ours() -> None:
    assert not can_fuse_layers(make_model("llama", fused_norms=False), 1)
    model = make_model("llama")
    assert can_fuse_layers(model, 1)
    model.model.layers[1].mlp.down_proj = nn.Linear(48, 32)
    assert not can_fuse_layers(model, 1)


@pytest.mark.parametrize(
    ("row_parallel", "has_bias", "ranks", "fits"),
    [
        (False, True, 1, True), (True, False, 2, True),
        (True, True, 2, False),  # its bias comes after the sum
        (False, False, 2, False),  # every rank has the whole layer: nothing is to be summed
    ],
)  # fmt: skip
def test_the_sum_must_be_the_last_thing_that_the_matmuls_do(
    row_parallel: bool, has_bias: bool, ranks: int, fits: bool
) -> None:
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = ShardedLinear(torch.zeros(32, 32), None, ranks > 1)
        layer.mlp.down_proj = ShardedLinear(torch.zeros(32, 48), torch.zeros(32) if has_bias else None, row_parallel)
    assert can_fuse_layers(model, ranks) == fits


def test_a_rank_without_a_shard_gives_zeros_to_the_sum() -> None:
    linear, rank = ShardedLinear(torch.zeros(32, 0), None, True), RankSum(2, make_peers(4))
    linear.leave_sum_to(rank)
    part = linear(torch.zeros(1, 3, 0))
    total, _ = rank.add_norm(part, torch.ones(1, 3, 32), torch.ones(32), 1e-6)
    assert torch.equal(total, torch.ones(1, 3, 32))


class Doubled:
    """Two ranks with the same weights: all parts are twice there."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch, peers: list[Peers | None]) -> None:
        monkeypatch.setattr(rank_sum, "all_reduce", lambda part: part.mul_(2))
        monkeypatch.setattr("dsserve.modeling.linear.all_reduce", lambda part: part.mul_(2))
        self.plain = model
        for layer in model.model.layers:
            layer.self_attn.o_proj._row_parallel = layer.mlp.down_proj._row_parallel = True
        self.fused = copy.deepcopy(model)
        first, second = (RankSum(2, peer) for peer in peers)
        use_fused_layers(self.fused, (first, second))


def make_peers(rows: int) -> Peers:
    """Memory whose other rank's part is always this one's."""
    own = torch.zeros(rows, 32)
    unused = torch.zeros(0)
    return Peers(0, 2, own, own, unused, unused, unused, ())


@pytest.mark.parametrize("rows", [None, 14])
@torch.inference_mode()
def test_parts_are_summed_once_over_the_ranks(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NCCL, and in the ranks' memory, which is written and not summed before."""
    doubled = Doubled(make_model("llama"), monkeypatch, [None if rows is None else make_peers(rows) for _ in range(2)])
    tokens = torch.randint(99, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = doubled.plain(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(doubled.fused(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4)


@torch.inference_mode()
def test_more_rows_than_the_memory_holds_go_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = make_peers(13)
    doubled = Doubled(make_model("llama"), monkeypatch, [peers, peers])
    tokens = torch.randint(99, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = doubled.plain(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(doubled.fused(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4)
    assert not peers.own.any()


def test_a_result_that_was_changed_before_its_sum_is_an_error() -> None:
    rank = RankSum(2, make_peers(4))
    part = rank.take(4)
    assert part is not None
    with pytest.raises(LoadError, match="compiled_ops: false"):
        rank.add_norm(part * 2, torch.zeros(4, 32), torch.ones(32), 1e-6)


def test_a_norm_gives_what_was_expected_for_that_very_input_only() -> None:
    norm = FusedRMSNorm(SimpleNamespace(rms_norm=rms_norm), torch.ones(4), 1e-6)
    x, ready = torch.ones(1, 4), torch.full((1, 4), 7.0)
    norm.expect(x, ready)
    assert norm(x) is ready and torch.allclose(norm(x), torch.ones(1, 4))
    norm.expect(x, ready)
    assert not torch.equal(norm(x.clone()), ready) and not torch.equal(norm(x), ready)


def test_a_fused_layer_keeps_the_names_of_its_parts() -> None:
    model = make_model("llama")
    names = {name for name, _ in model.named_modules()}
    use_fused_layers(model, (RankSum(1, None), RankSum(1, None)))
    assert {name for name, _ in model.named_modules()} == names
    assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)


def test_a_layer_with_two_parents_stays_one() -> None:
    shared = nn.Linear(4, 3)
    model = nn.Sequential(nn.Sequential(shared), nn.ModuleDict({"again": shared}))
    x, expected = torch.randn(2, 4), shared.weight.detach().clone()
    assert replace_layers(model, ShardedLinear) == 1
    first, second = model[0][0], model[1]["again"]
    assert first is second and torch.equal(first(x), F.linear(x, expected, first._bias))
