"""A step in one packed pass, under masks, and as on a GPU: the logits of the model alone, in each family that hands a
step on to attention; others are found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsserve.attention.backend import NAME
from dsserve.core.step_plan import Wanted
from dsserve.parallel.rank import RankInfo
from dsserve.runner import autotp
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.base import StepLogits
from dsserve.runner.forward_pass import PackedPass
from dsserve.runner.masked_pass import MaskedPass
from tests.support.torch_pages import use_torch_pages

CPU, ALONE, WORDS = torch.device("cpu"), RankInfo(0, 0, 1, 1), 99
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3, **HEADS}
PLAIN = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "phi3": {**LLAMA, "pad_token_id": 0, "sliding_window": None},
    "gpt_neox": PLAIN,
    "opt": {**PLAIN, "word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3},
}
LENGTHS = (7, 7, 7, 1, 19, 4, 4, 12)  # 61 tokens: the pass is padded


def make_model(family: str, **members: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"vocab_size": WORDS, "max_position_embeddings": 64, **members})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def make_runner(model: Any, page: int = 4) -> ModelRunner:
    return ModelRunner(model, KVSize.of_rows(len(LENGTHS), 64, page), ALONE, CPU)


def draw(length: int, seed: int = 1) -> list[int]:
    return torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps_of(runner: ModelRunner) -> tuple[list[StepLogits], dict[int, list[int]]]:
    """Prompts, decoded texts, and decoded ones beside parts; and the text of each row."""
    trial, texts = runner.trial(), {row: draw(length, row) for row, length in enumerate(LENGTHS)}
    found = [trial.step(*texts.items(), wanted=Wanted.NEXT | Wanted.ALL)]
    for parts in (
        {0: [3], 4: [5], 7: [9]},
        {1: [3], 0: [8], 3: draw(9), 4: draw(20), 6: [1, 2]},
        {row: [row] for row in range(len(LENGTHS))},
    ):
        found.append(trial.step(*parts.items()))
        for row, tokens in parts.items():
            texts[row] = texts[row] + tokens
    return found, texts


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_have_the_logits_of_the_model_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, **FAMILIES[family])
    packed = make_runner(model)
    assert isinstance(packed._forward, PackedPass) and model.config._attn_implementation == NAME
    gpu = make_runner(model, 16)
    use_torch_pages(gpu)
    monkeypatch.setattr(autotp, "can_pack", lambda module: False)
    masked = make_runner(model)
    assert isinstance(masked._forward, MaskedPass)
    (first, texts), *others = (steps_of(runner) for runner in (packed, gpu, masked))
    for other, _ in others:
        for one, found in zip(first, other, strict=True):
            torch.testing.assert_close(found.next, one.next, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.prompts, one.prompts, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        for row, text in texts.items():
            alone = model(torch.tensor([text])).logits[0]
            torch.testing.assert_close(first[-1].next[row], alone[-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(first[0].prompts[row], alone[: LENGTHS[row]], rtol=1e-4, atol=1e-4)
            assert alone.std() > 0.05


def test_logits_are_those_that_somebody_reads() -> None:
    runner = make_runner(make_model("llama", **LLAMA))
    trial = runner.trial()
    found = trial.step((0, draw(5)), (1, draw(9)), wanted=Wanted.NOTHING)
    assert found.next.shape == (0, WORDS) and found.prompts == ()
    both = trial.step((0, [3]), (1, draw(4)), wanted=Wanted.NEXT | Wanted.ALL)
    assert both.next.shape == (2, WORDS) and [len(part) for part in both.prompts] == [1, 4]
    assert torch.equal(both.next[1], both.prompts[1][-1])


def test_tokens_that_the_device_chose_are_taken_from_it() -> None:
    runner = make_runner(make_model("llama", **LLAMA))

    def decode(known: bool) -> torch.Tensor:
        trial = runner.trial()
        trial.step((0, draw(5)), (1, draw(9)), (2, draw(2)))
        if known:
            return trial.logits((2, [11]), (0, [12]), (1, [3, 4]))
        chosen = torch.tensor([12, 0, 11])
        return trial.step((2, [0]), (0, [0]), (1, [3, 4]), sources=(2, 0, -1), chosen=chosen).next

    assert torch.equal(decode(True), decode(False))


@pytest.mark.parametrize(
    ("family", "members"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("gemma2", {**LLAMA, "head_dim": 8, "sliding_window": 64}),  # caps its scores
        ("gpt_oss", {**LLAMA, "head_dim": 8, "sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    ],
)
def test_attention_of_another_kind_is_found_out(family: str, members: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=WORDS, max_position_embeddings=64, pad_token_id=0, **members)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    runner = make_runner(model)
    assert isinstance(runner._forward, MaskedPass) and not runner.is_packed
    assert model.config._attn_implementation == before, "it computes alone what it did before"


def test_a_model_that_keeps_the_step_to_itself_is_found_out() -> None:
    """Its attention never hears of it."""
    model = make_model("llama", **LLAMA)
    for layer in model.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=original, paged_step=None, **kwargs: forward(*args, **kwargs)
    runner = make_runner(model)
    assert isinstance(runner._forward, MaskedPass)
    text = draw(12)
    trial = runner.trial()
    trial.step((0, text[:5]), (1, draw(3)))
    with torch.inference_mode():
        expected = model(torch.tensor([text])).logits[0, -1]
    torch.testing.assert_close(trial.logits((0, text[5:]))[0], expected, rtol=1e-4, atol=1e-4)
