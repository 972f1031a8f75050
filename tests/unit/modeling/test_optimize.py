"""What is replaced in a model is decided by all ranks together: layers that differ would make other passes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.config.handler import HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.modeling import optimize
from dsserve.modeling.linear import PackedLinear
from dsserve.parallel.rank import RankInfo

CPU, FIRST_OF_TWO = torch.device("cpu"), RankInfo(0, 0, 2, 2)


def make() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    ).eval()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this rank could do, in the order of the questions; the other rank can do nothing."""
    values: list[int] = []

    def least(value: int, rank: RankInfo) -> int:
        values.append(value)
        return 0

    monkeypatch.setattr(optimize, "agree_on_least", least)
    monkeypatch.setattr(optimize, "load_ops", lambda device: object())
    return values


def test_a_rank_leaves_what_another_cannot_do(asked: list[int]) -> None:
    model = make()
    said = optimize.tune(model, HandlerConfig(model_path="m"), FIRST_OF_TWO, CPU, 256)
    assert asked == [1, 1] and said.startswith("0 packed matmuls, 0 fused operations")
    assert not any(isinstance(part, PackedLinear) for part in model.modules())


def test_what_must_be_done_is_refused_then(asked: list[int]) -> None:
    with pytest.raises(LoadError, match=r"handler\.pack_weights: true is not possible"):
        optimize.tune(make(), HandlerConfig(model_path="m", pack_weights=True), FIRST_OF_TWO, CPU, 256)


def test_a_layer_whose_weight_the_model_reads_stays() -> None:
    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wg = torch.nn.Linear(16, 4)
            self.other = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wg(x.to(self.wg.weight.dtype)) + self.other(x)

    model, x = Router(), torch.randn(3, 16)
    expected = model(x)
    assert optimize.pack_weights(model) == 1 and isinstance(model.other, PackedLinear)
    assert torch.allclose(model(x), expected, atol=1e-5)
