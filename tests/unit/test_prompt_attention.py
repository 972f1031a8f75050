"""Several prompts in one pass attend one by one, as under a mask, in every family that hands their lengths on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from dsserve.generation import decode_attention
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.plan import Admission, Plan

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **HEADS}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "phi3": LLAMA | {"pad_token_id": 0},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
LENGTHS = (7, 7, 7, 1, 19, 4, 4, 12)  # 61 tokens: the pass is padded


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths that attention was given, in each layer."""
    calls: list[list[int]] = []
    original = decode_attention.attend_by_prompt

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["prompt_lengths"])
        return original(*args, **kwargs)

    monkeypatch.setattr(decode_attention, "attend_by_prompt", attend)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_under_a_mask(family: str, seen: list[list[int]]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=99, max_position_embeddings=64, **FAMILIES[family])
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(99, (length,), generator=generator).tolist()) for length in LENGTHS]
    plan = Plan(admit=tuple(Admission(prompt, all_logits=True) for prompt in prompts))

    def logits() -> torch.Tensor:
        found = ModelRunner(module, len(LENGTHS), 64, torch.device("cpu")).execute(plan)
        assert found is not None
        return torch.cat(found.prompts)

    masked = logits()
    assert seen == []
    # What `use_decode_attention` does where there is Triton, for its prefill.
    AttentionInterface.register(decode_attention.NAME, decode_attention.attend)
    AttentionMaskInterface.register(decode_attention.NAME, sdpa_mask)
    module.config._attn_implementation = decode_attention.NAME
    assert torch.allclose(logits(), masked, atol=1e-5)
    assert seen == [[*LENGTHS, 3]] * 2
