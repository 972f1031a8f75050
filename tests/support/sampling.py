"""Logits and requests that samplers are compared on."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from dsserve.core.request import GenerationRequest, SamplingParams
from dsserve.sampling.pending import Launch
from dsserve.sampling.sampler import SamplingState

KINDS = ["plain", "plain", "ties", "equal", "few", "holes", "broken"]

limits = st.none() | st.floats(0.01, 1) | st.sampled_from([1 / 3, 0.25, 0.5, 0.75, 0.9999999, 1.0])
params = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(0.05, 2) | st.sampled_from([5e-324, 1e-5, 9.9e-4, 1e-3, 1.0]),
    top_k=st.none() | st.integers(1, 400) | st.sampled_from([127, 128, 129]),
    top_p=limits,
    min_p=limits | st.just(0.0),
    typical_p=limits,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    logit_bias=st.sampled_from([{}, {}, {2: 5.0}]),
    seed=st.integers(0, 1000),
    min_tokens=st.sampled_from([0, 2]),
)


def states_of(rows: list[SamplingParams]) -> list[SamplingState]:
    return [SamplingState(GenerationRequest("r", (1, 2, 0, 1), 9, params)) for params in rows]


def make_logits(seed: int, rows: int, width: int, spread: float, dtype: torch.dtype, kind: str) -> torch.Tensor:
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread
    if kind == "ties":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.ones_like(logits)
    elif kind == "few":  # of 5 tokens at most, as a grammar leaves them
        logits[:, 5:] = float("-inf")
    elif kind == "holes":
        logits[:, ::3] = float("-inf")
    elif kind == "broken":  # the first row is no numbers in one way or another
        logits[0, seed % width] = [float("nan"), float("inf")][seed % 2]
        logits[-1] = float("-inf") if seed % 3 == 0 else logits[-1]
    return logits.to(dtype)


def assert_same(ways: list[Launch], logits: torch.Tensor, rows: list[SamplingParams], steps: int) -> None:
    """All ways choose the same tokens over some steps, each with streams and histories of its own."""
    states = [states_of(rows) for _ in ways]
    for _ in range(steps):
        tokens, *others = (way(logits, own).read() for way, own in zip(ways, states, strict=True))
        assert all(other == tokens for other in others)
        failed, *also_failed = ([state.fault and state.fault.cause for state in own] for own in states)
        assert all(other == failed for other in also_failed)
        for own in states:
            for state, token in zip(own, tokens, strict=True):
                state.accept(token)
