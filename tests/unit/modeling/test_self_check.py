"""The self-check catches wrong logits and passes right ones."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.core.errors import LoadError
from dsserve.modeling.dtype import convert_parameters
from dsserve.modeling.self_check import LENGTH, SelfCheck


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_same_model_passes_in_every_dtype(model: LlamaForCausalLM) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        own = copy.deepcopy(model)
        check = SelfCheck.capture(own, dtype)
        assert check.logits.shape == (LENGTH, 50)
        assert own.lm_head.weight.dtype == torch.float32, "a large weight was converted"
        convert_parameters(own, dtype)
        logits = own(check.token_ids[None]).logits[0].detach()
        assert check.verify(logits, "nothing") == 0.0
        assert check.verify(logits[-3:], "nothing") == 0.0


@pytest.mark.parametrize("damage", ["one head", "nan", "order"])
def test_damage_is_refused_with_the_figures(model: LlamaForCausalLM, damage: str) -> None:
    check = SelfCheck.capture(model, torch.float32)
    logits = check.logits.clone()
    if damage == "one head":
        logits[:, :8] += 0.01 * logits.abs().max()
    elif damage == "nan":
        logits[3, 3] = float("nan")
    else:
        logits = logits.flip(0)
    with pytest.raises(LoadError, match="self-check failed: sharding changed the logits by"):
        check.verify(logits, "sharding")
