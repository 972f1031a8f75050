"""KV heads for every rank, and BLOOM's bias for a rank's heads: against transformers, on whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from dsserve.config.handler import HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.loading.hf_model import load_outline
from dsserve.parallel.alibi import RankAlibi, key_positions, use_rank_alibi
from dsserve.parallel.kv_heads import plan_kv_copies, repeat_kv_heads
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.masked_pass import MaskedPass

SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}


def make(architecture: str, heads: int, kv_heads: int, **more: Any) -> Any:
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
    }
    config, model = kinds[architecture]
    torch.manual_seed(0)
    return model(config(num_attention_heads=heads, num_key_value_heads=kv_heads, **{**SIZES, **more})).eval()


def make_meta(heads: int, kv_heads: int) -> Any:
    with torch.device("meta"):
        return make("llama", heads, kv_heads, hidden_size=16 * heads, num_hidden_layers=1)


@settings(deadline=None)
@given(kv_heads=st.integers(1, 12), group=st.integers(1, 12), ranks=st.integers(1, 200))
def test_the_fewest_copies_that_give_every_rank_a_head(kv_heads: int, group: int, ranks: int) -> None:
    heads = kv_heads * group
    model = make_meta(heads, kv_heads)
    if ranks > heads:
        with pytest.raises(LoadError, match=rf"{heads} attention head\(s\).*nproc-per-node to {heads} or less"):
            plan_kv_copies(model, ranks)
        return
    copies = plan_kv_copies(model, ranks)
    assert group % copies == 0 and kv_heads * copies >= ranks
    assert not any(group % fewer == 0 and kv_heads * fewer >= ranks for fewer in range(1, copies))


@pytest.mark.parametrize(
    ("architecture", "more"), [("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 24}), ("llama", {"head_dim": 8})]
)
@pytest.mark.parametrize(("ranks", "copies"), [(2, 1), (3, 2), (4, 2), (5, 4), (8, 4)])
def test_repeated_kv_heads_keep_the_logits(architecture: str, more: dict, ranks: int, copies: int) -> None:
    model = make(architecture, 8, 2, **more)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        assert repeat_kv_heads(model, ranks) == copies
        found = model(tokens)
    assert found.past_key_values.layers[0].keys.shape[1] == model.config.num_key_value_heads == 2 * copies
    assert torch.allclose(found.logits, expected, atol=1e-6)
    assert expected.std() > 0.01


def test_fused_projections_are_refused_where_a_rank_would_have_no_kv_head() -> None:
    model = make("phi3", 8, 2)
    assert plan_kv_copies(model, 2) == 1
    with pytest.raises(LoadError, match=r"2 KV head\(s\).*nproc-per-node to 2 or less"):
        repeat_kv_heads(model, 4)


def test_a_shape_is_refused_without_its_weights(tmp_path: Path) -> None:
    make("llama", 4, 2).config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    outline = load_outline(HandlerConfig(model_path=str(tmp_path)), tmp_path)
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert plan_kv_copies(outline, 4) == 2
    with pytest.raises(LoadError, match="LlamaForCausalLM on 5 ranks: it has 4 attention head"):
        plan_kv_copies(outline, 5)


@pytest.mark.parametrize("heads", [1, 4, 8, 9, 12])
def test_a_rank_s_alibi_is_its_part_of_the_whole(heads: int) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    whole = build_alibi_tensor(mask, heads, torch.float32).view(2, heads, 1, 6)
    for first in range(heads):
        for last in range(first + 1, heads + 1):
            part = RankAlibi(heads, first, last, torch.device("cpu"))(mask, heads, torch.float32)
            assert torch.allclose(part.view(2, last - first, 1, 6), whole[:, first:last], atol=0, rtol=1e-6)


def test_key_positions() -> None:
    inf = float("-inf")
    padded = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert key_positions(padded).tolist() == [[0, 0, 1], [0, 1, 2]]
    step = torch.tensor([[0.0, 0, inf, inf], [0, 0, 0, 0]])[:, None, None]
    assert key_positions(step).tolist() == [[0, 1, 2, 3]] * 2
    packed = torch.tensor([[0, inf, inf], [inf, 0, inf], [inf, 0, 0]])[None, None]
    assert key_positions(packed).tolist() == [[0, 0, 1]]
    # Two queries of a text whose first token is in the cache, beside a whole text of one token: as many keys as queries
    # would say nothing of their places.
    continued = torch.tensor([[0, 0, inf, inf], [0, 0, 0, inf], [inf, inf, inf, 0]])[None, None]
    assert key_positions(continued).tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_bloom_through_pages(dtype: torch.dtype, limit: float) -> None:
    """The second prompt lies 300 columns to the right, where bf16 knows even numbers only. Then again with the second
    one's beginning read in a step of its own."""
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=96, n_layer=2, n_head=6, vocab_size=90, initializer_range=0.2)
    model = BloomForCausalLM(config).eval().to(dtype)
    prompts = tuple(tuple(torch.randint(90, (length,)).tolist()) for length in (300, 40))
    with torch.inference_mode():
        texts = [model(torch.tensor([[*prompt, 7]])).logits[0, -2:] for prompt in prompts]
    use_rank_alibi(model, 0, 1)
    for begun in (0, 30):
        runner = ModelRunner(model, KVSize.of_rows(2, 320), RankInfo(0, 0, 1, 1), torch.device("cpu"))
        assert not runner.is_packed and isinstance(runner._forward, MaskedPass)
        trial = runner.trial()
        if begun:
            trial.step((1, prompts[1][:begun]))
        first = trial.logits((0, prompts[0]), (1, prompts[1][begun:]))
        second = trial.logits((0, (7,)), (1, (7,)))
        for row, expected in enumerate(texts):
            found = torch.stack([first[row], second[row]])
            assert (found - expected).norm() / expected.norm() < limit
