"""Several prompts in one pass attend one by one, as under a mask, in every family that hands their lengths on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from dsserve.attention import decode as decode_attention
from dsserve.attention import prefill as prompt_attention
from dsserve.attention.prefill import PromptSpans
from dsserve.core.step_plan import Admission, Plan
from dsserve.runner import forward_pass
from dsserve.runner.autotp import ModelRunner

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
    """The lengths that attention was given, layer by layer."""
    calls: list[list[int]] = []
    original = decode_attention.attend_by_prompt

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[5].lengths)
        return original(*args, **kwargs)

    monkeypatch.setattr(decode_attention, "attend_by_prompt", attend)
    return calls


def in_spans(query: Any, key: Any, value: Any, scaling: float | None, spans: PromptSpans) -> Any:
    """What the flash kernel computes, in fp32 on a CPU."""
    assert spans.table is not None
    out = torch.zeros_like(query.transpose(1, 2))
    ends, firsts, counts = spans.table.tolist()
    for (start, end), first, count in zip(pairwise(ends), firsts[:-1], counts[:-1], strict=True):
        assert end - start <= spans.longest and count <= spans.most
        if end > start and count:
            part, seen = query[:, :, start:end], torch.ones(end - start, count, dtype=torch.bool)
            keys, values = (tensor[:, :, first : first + count] for tensor in (key, value))
            mask = seen.tril(count - (end - start))
            attended = scaled_dot_product_attention(part, keys, values, mask, scale=scaling, enable_gqa=True)
            out[:, start:end] = attended.transpose(1, 2)
    return out


@pytest.mark.parametrize("way", ["prompt by prompt", "flash"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_under_a_mask(
    family: str, way: str, seen: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=99, max_position_embeddings=64, **FAMILIES[family])
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(99, (length,), generator=generator).tolist()) for length in LENGTHS]
    # The second pass finds beginnings in the cache: of row 4, and of row 0 before it is freed.
    plans = [
        Plan(admit=tuple(Admission(prompt, all_logits=True) for prompt in prompts)),
        Plan(evict=(7, 6), admit=(Admission((5, *prompts[7]), 4, 17, True), Admission((8,), 0, 6, True))),
    ]

    def logits() -> torch.Tensor:
        runner = ModelRunner(module, len(LENGTHS), 64, torch.device("cpu"))
        found = [step for plan in plans if (step := runner.execute(plan)) is not None]
        return torch.cat([part for step in found for part in step.prompts])

    masked = logits()
    assert seen == []
    # What `use_decode_attention` does where there is Triton, for its prefill.
    AttentionInterface.register(decode_attention.NAME, decode_attention.attend)
    AttentionMaskInterface.register(decode_attention.NAME, sdpa_mask)
    module.config._attn_implementation = decode_attention.NAME
    monkeypatch.setattr(prompt_attention, "flash", in_spans)
    monkeypatch.setattr(forward_pass, "has_flash", lambda *_: way == "flash")
    assert torch.allclose(logits(), masked, atol=1e-5)
    assert seen == [[*LENGTHS, 3]] * 2 + [[13, 1, 2]] * 2 * (way == "flash")


def test_a_model_that_keeps_the_spans_to_itself_attends_under_the_mask(seen: list[list[int]]) -> None:
    """Its attention never hears of them, so that later passes do not bring them."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=99, **LLAMA)).eval()
    module.config._attn_implementation = decode_attention.NAME
    for layer in module.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=original, prompt_spans=None, **kwargs: forward(*args, **kwargs)
    runner = ModelRunner(module, 3, 64, torch.device("cpu"))
    together = runner.execute(Plan(admit=(Admission((5, 6, 7)), Admission((8, 9)))))
    alone = runner.execute(Plan(evict=(1, 0), admit=(Admission((8, 9)),)))
    assert together is not None and alone is not None and seen == [] and runner.forward._by_prompt is False
    assert torch.allclose(together.next[1], alone.next[0], atol=1e-5)


def test_there_is_no_flash_kernel_on_a_cpu_or_in_fp32() -> None:
    assert not prompt_attention.has_flash(torch.bfloat16, 64, torch.device("cpu"))
    assert not prompt_attention.has_flash(torch.float32, 64, torch.device("cuda"))
