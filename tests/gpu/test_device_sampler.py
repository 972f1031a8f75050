"""The sampler on a GPU: captured, uncaptured and the path over the host choose the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsserve.core.request import SamplingParams
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.support.sampling import KINDS, assert_same, make_logits, params, states_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
SLOTS, WIDTHS = 12, (2000, 33_001, 128_256)
RULES = SamplingParams(0.8, top_k=50, top_p=0.95, min_p=0.02, typical_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def samplers() -> dict[int, tuple[DeviceSampler, DeviceSampler]]:
    """For each width one with graphs and one without."""
    made, device = {}, torch.device("cuda")
    for width in WIDTHS:
        captured = DeviceSampler(SLOTS, width, device)
        captured.capture(torch.cuda.graph_pool_handle())
        made[width] = captured, DeviceSampler(SLOTS, width, device)
    return made


def assert_all_same(
    pair: tuple[DeviceSampler, DeviceSampler], logits: torch.Tensor, rows: list[SamplingParams]
) -> None:
    assert_same([HostChoice, *(sampler.launch for sampler in pair)], logits.to("cuda"), rows, steps=3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(params, min_size=1, max_size=SLOTS),
    st.integers(0, 10_000),
    st.sampled_from(WIDTHS),
    st.sampled_from([0.3, 3.0, 8.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(KINDS),
)
def test_random_requests(
    samplers: dict, rows: list[SamplingParams], seed: int, width: int, spread: float, dtype: torch.dtype, kind: str
) -> None:
    assert_all_same(samplers[width], make_logits(seed, len(rows), width, spread, dtype, kind), rows)


@pytest.mark.parametrize("count", range(1, SLOTS + 1))
@pytest.mark.parametrize("row", [SamplingParams(0.9), RULES, SamplingParams(1.0, top_k=40)], ids=["free", "all", "k"])
def test_every_number_of_rows(samplers: dict, row: SamplingParams, count: int) -> None:
    """Rows beyond them hold what the step before left."""
    logits = make_logits(count, count, 128_256, 4.0, torch.bfloat16, "plain")
    assert_all_same(samplers[128_256], logits, [replace(row, seed=index) for index in range(count)])


@pytest.mark.parametrize("row", [SamplingParams(0.9), RULES], ids=["free", "all"])
def test_a_step_waits_for_nothing_but_its_own_tokens(samplers: dict, row: SamplingParams) -> None:
    """Beside the edits: torch fails at every wait for all that is queued."""
    captured, _ = samplers[128_256]
    rows = [replace(row, repetition_penalty=1.0, seed=index) for index in range(SLOTS)]
    logits = make_logits(1, SLOTS, 128_256, 8.0, torch.bfloat16, "plain").to("cuda")
    expected, states = captured.launch(logits, states_of(rows)).read(), states_of(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = captured.launch(logits, states)
        tokens = found._found.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.tokens.cpu(), torch.tensor(tokens).clamp(min=0))
    assert all(token in (-1, wanted) for token, wanted in zip(tokens, expected, strict=True))
