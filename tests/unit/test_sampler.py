"""Sampling against transformers' own processors: the same logits give the same distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dsserve.generation.request import SamplingParams
from dsserve.generation.sampler import Sampler, choose_greedily

LOGITS = torch.randn(200, generator=torch.Generator().manual_seed(7)) * 4


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(temperature=1.0), []),
        (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (SamplingParams(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
        (SamplingParams(temperature=1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (
            SamplingParams(temperature=1.3, top_k=20, top_p=0.9),
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_the_distribution_is_transformers(params: SamplingParams, warpers: list) -> None:
    expected = LOGITS[None]
    for warper in warpers:
        expected = warper(torch.zeros(1, 1, dtype=torch.int64), expected)
    found = Sampler(params).probabilities(LOGITS)
    torch.testing.assert_close(found, torch.softmax(expected[0], dim=-1), rtol=1e-5, atol=1e-8)
    assert torch.equal(found > 0, torch.softmax(expected[0], dim=-1) > 0)


def draws(params: SamplingParams, count: int = 50) -> list[int]:
    sampler = Sampler(params)
    return [sampler.choose(LOGITS) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_torchs_argmax_and_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[7] = 1.0
    assert choose_greedily(logits) == logits.argmax(dim=-1).tolist()


def test_a_seed_repeats_and_another_differs() -> None:
    first = draws(SamplingParams(temperature=1.5, seed=3))
    assert first == draws(SamplingParams(temperature=1.5, seed=3))
    assert first != draws(SamplingParams(temperature=1.5, seed=4))
    assert len(set(first)) > 3


def test_without_a_seed_two_requests_differ() -> None:
    assert draws(SamplingParams(temperature=2.0)) != draws(SamplingParams(temperature=2.0))


def test_a_tiny_temperature_stays_finite_and_is_greedy() -> None:
    assert set(draws(SamplingParams(temperature=1e-30))) == {int(LOGITS.argmax())}
