"""Perplexity of the real SmolLM2 on a fixed English text: quantized weights within bounds of bf16's, one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.bench.perplexity import load, perplexity, reference_text, shuffle_features

CPU = torch.device("cpu")
# Largest change of bf16's perplexity. int4's is small since the demo's weights were made of 4-bit groups of 32.
LARGEST = {"int8": 0.02, "int4": 0.02}


@pytest.fixture(scope="module")
def token_ids(smollm2: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)(reference_text(), return_tensors="pt").input_ids[0][:513]


@pytest.fixture(scope="module")
def bf16(smollm2: Path, token_ids: torch.Tensor) -> float:
    return perplexity(load(str(smollm2), "bf16", "bf16", CPU), token_ids, 256)


def test_the_yardstick_is_right(smollm2: Path, token_ids: torch.Tensor, bf16: float) -> None:
    """transformers' own loss of the same windows, and a model that knows English."""
    model = load(str(smollm2), "bf16", "bf16", CPU)
    with torch.inference_mode():
        losses = [model(piece[None], labels=piece[None]).loss for piece in (token_ids[:257], token_ids[256:])]
    assert 5 < bf16 < 40
    assert bf16 == pytest.approx(torch.stack(losses).float().mean().exp().item(), rel=1e-2)


@pytest.mark.parametrize("mode", LARGEST)
def test_quantized_weights_stay_near_bf16(smollm2: Path, token_ids: torch.Tensor, bf16: float, mode: str) -> None:
    found = perplexity(load(str(smollm2), mode, "bf16", CPU), token_ids, 256)
    assert found != bf16
    assert abs(found / bf16 - 1) < LARGEST[mode]


def test_weights_that_were_never_4_bits_lose_more(smollm2: Path, token_ids: torch.Tensor, bf16: float) -> None:
    """Features in another order are the same function (fp32), and int4 no longer finds the groups they came from."""
    model = load(str(smollm2), "fp32", "fp32", CPU)
    with torch.inference_mode():
        before = model(token_ids[None, :64]).logits
        shuffle_features(model)
        assert (model(token_ids[None, :64]).logits - before).abs().max() < 1e-3
    assert perplexity(load(str(smollm2), "int4", "bf16", CPU, shuffle=True), token_ids, 256) > bf16 * 1.05
