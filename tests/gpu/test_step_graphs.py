"""Steps of many prompts in CUDA graphs on a GPU: each text's logits are those of the model on it alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.attention.triton_pages import LONG
from dsserve.kernels.ops import load_ops
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.step_graphs import MOST_TOKENS
from tests.support.paged import make_runner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
HALVES = [torch.float16, torch.bfloat16]
ROWS, CONTEXT, VOCABULARY = 24, 6000, 2000
# ||out - ref|| / ||ref|| of logits that another order of sums explains.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    device = torch.device("cuda", 0)
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    assert use_fused_ops(model, load_ops(device))
    return model


def make_captured(model: Any, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """A runner all of whose steps must run in graphs."""
    runner = make_runner(model, KVSize.of_rows(ROWS, CONTEXT), device="cuda:0")
    runner.capture_graphs(is_leader=True, tokens=MOST_TOKENS)

    def fail(*_: Any) -> None:
        raise AssertionError("the step was not captured")

    monkeypatch.setattr(runner, "_run_if_it_fits", fail)
    return runner


@torch.inference_mode()
def alone(model: Any, tokens: tuple[int, ...], last: int) -> torch.Tensor:
    """fp32 logits `[last, V]` of a text's last tokens."""
    ids = torch.tensor([tokens], device=model.device)
    return model(ids, use_cache=False, logits_to_keep=last).logits[0].float()


def draw_texts(lengths: list[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.float() - wanted).norm() <= TOLERANCE[found.dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_pass_of_many_prompts_has_the_logits_of_each_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(dtype)
    runner = make_captured(model, monkeypatch)
    prompts = draw_texts([30 + 7 * number for number in range(ROWS - 4)])
    assert 1024 < sum(map(len, prompts)) <= MOST_TOKENS
    trial = runner.trial()
    together = trial.logits(*enumerate(prompts))
    second = trial.logits(*((row, (7,)) for row in range(len(prompts))))
    for row, prompt in enumerate(prompts):
        assert_near(torch.stack([together[row], second[row]]), alone(model, (*prompt, 7), 2))


@pytest.mark.parametrize("dtype", HALVES)
def test_parts_beside_decoded_texts_have_the_logits_of_each_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text in parts, each beside decoded ones; then it is decoded beside them, by a graph for long texts."""
    model = make_model(dtype)
    runner = make_captured(model, monkeypatch)
    short, (long,) = draw_texts([3 + 11 * row for row in range(7)]), draw_texts([LONG + 900])
    trial = runner.trial()
    trial.step(*enumerate(short))
    said = [list(prompt) for prompt in short]
    cuts = [0, 300, 301, 1500, LONG + 899, LONG + 900]
    for begin, end in pairwise(cuts):
        decoded = [(row, (begin % 97 + row,)) for row in range(len(short))]
        found = trial.logits(*decoded, (len(short), long[begin:end]))
        for row, (token,) in decoded:
            said[row].append(token)
            assert_near(found[row : row + 1], alone(model, tuple(said[row]), 1))
        assert_near(found[-1:], alone(model, long[:end], 1))
