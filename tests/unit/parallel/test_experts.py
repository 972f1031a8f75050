"""The share of the layers that a rank holds is said where experts stay whole, and only there."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsserve.parallel.experts import LayerWeights

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def make(model_type: str, **members: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE, **members))


def halve(module: torch.nn.Module) -> None:
    """What AutoTP does over two ranks, near enough: half of each matrix of a linear layer."""
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear) and ".layers." in name:
            child.weight = torch.nn.Parameter(child.weight[: child.weight.shape[0] // 2])


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Without what libraries say when they are first imported."""
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name.startswith("dsserve")]


def test_experts_that_stay_whole_are_said_with_the_share(caplog: pytest.LogCaptureFixture) -> None:
    model = make("mixtral", num_local_experts=4)
    before = LayerWeights.of(model)
    halve(model)
    linear = 2 * 4 * 32 * 32  # q, k, v, o of two layers
    norms, routers, experts = 2 * 2 * 32, 2 * 4 * 32, 2 * 4 * 3 * 32 * 64
    assert before.numbers == linear + norms + routers + experts
    before.warn_of_whole_experts(model, 2)
    held = sum(parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name)
    assert held < before.numbers
    assert f"each of 2 ranks holds {100 * held / before.numbers:.0f} % of the layers' weights" in caplog.text
    assert [level for level, _ in said(caplog)] == [logging.WARNING]


@pytest.mark.parametrize("case", ["no experts", "one rank", "cut experts"])
def test_nothing_is_said_elsewhere(case: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama") if case == "no experts" else make("mixtral", num_local_experts=4)
    before = LayerWeights.of(model)
    halve(model)
    if case == "cut experts":
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > 2:
                    setattr(module, name, torch.nn.Parameter(parameter[:, : parameter.shape[1] // 2]))
    before.warn_of_whole_experts(model, 1 if case == "one rank" else 2)
    assert not said(caplog)
