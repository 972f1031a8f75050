"""Packed weights and the memory of those that they replace."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.modeling.linear import pack_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
MIB = 2**20


def test_replaced_weights_leave_no_memory_that_nobody_can_have() -> None:
    """q, k and v as one take 48 MiB: put where the layer before had its gate's 64, they kept the other 16."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=1000, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    model = model.to_empty(device="cuda")
    held = torch.cuda.memory_allocated()
    assert pack_weights(model) == 8 * 4 + 1
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == pytest.approx(held, abs=MIB)
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before < 48 * MIB
