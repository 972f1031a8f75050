"""Sampling against transformers' own processors: the same logits give the same distribution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from dsserve.core.request import GenerationRequest, SamplingParams
from dsserve.sampling.filters import FIRST, Candidates, find_candidates, find_top
from dsserve.sampling.penalties import pack, unpack
from dsserve.sampling.random_stream import Uniforms
from dsserve.sampling.sampler import SamplingState, choose, choose_greedily, draw_from_all, edit, report_logprobs
from dsserve.sampling.temperature import scale, scaled
from dsserve.sampling.token_history import TokenCounts

LOGITS = torch.randn(200, generator=torch.Generator().manual_seed(7)) * 4
PROMPT = (3, 4, 5, 3)


def state(params: SamplingParams, generated: tuple[int, ...] = (), ending: frozenset[int] = frozenset()) -> Any:
    made = SamplingState(GenerationRequest("r", PROMPT, 9, params), ending)
    for token in generated:
        made.accept(token)
    return made


def distribution(logits: torch.Tensor, params: SamplingParams, generated: tuple[int, ...] = ()) -> np.ndarray:
    """What the sampler draws from, over the whole vocabulary."""
    edited = edit(logits[None], [state(params, generated)])
    scale(edited, [params.temperature])
    (found,) = find_candidates(edited, [params])
    whole = np.zeros(logits.shape[0])
    whole[found.ids] = found.probabilities
    return whole


def transformers_distribution(logits: torch.Tensor, params: SamplingParams, generated: tuple[int, ...] = ()) -> Any:
    """The same by transformers' processors, in the order of its `generate`."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.typical_p is not None and params.typical_p < 1:
        processors.append(TypicalLogitsWarper(params.typical_p))
    scores = processors(torch.tensor([[*PROMPT, *generated]]), logits[None].double())
    return torch.softmax(scores[0], dim=-1).numpy()


values = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 2),
    top_k=st.none() | st.integers(1, 400),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    typical_p=st.none() | st.floats(0.01, 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, 199), st.floats(-100, 100), max_size=5),
)


@settings(max_examples=400, deadline=None)
@given(values, st.integers(0, 10_000), st.sampled_from([200, 20_000]), st.floats(0.2, 8))
def test_the_distribution_is_transformers(params: SamplingParams, seed: int, vocabulary: int, spread: float) -> None:
    """Where a limit falls on a token, rounding decides: the same limit moved by a millionth counts too, and so do
    tokens at the limit that weigh less than a millionth together (a limit next to 1 cannot be moved between them)."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    logits = logits.float()
    expected = transformers_distribution(logits, params, (7, 8, 7))
    for nudge in (0, 1e-6, -1e-6):
        found = distribution(logits, nudged(params, nudge), (7, 8, 7))
        disputed = (found > 0) != (expected > 0)
        if found[disputed].sum() + expected[disputed].sum() < 1e-6:
            break
    else:
        pytest.fail(f"tokens {disputed.nonzero()[0]} are kept by one side only")
    np.testing.assert_allclose(found[~disputed], expected[~disputed], rtol=2e-4, atol=1e-9)


def nudged(params: SamplingParams, nudge: float) -> SamplingParams:
    """The same limits, moved by a relative `nudge`."""

    def move(limit: float | None) -> float | None:
        return None if limit is None else limit * (1 + nudge)

    moved = {"top_p": move(params.top_p), "min_p": move(params.min_p), "typical_p": move(params.typical_p)}
    return replace(params, **moved)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [SamplingParams(1.0), SamplingParams(0.7), SamplingParams(1.3, top_k=20, top_p=0.9)])
def test_chosen_tokens_follow_the_distribution(params: SamplingParams) -> None:
    """20,000 draws of one request against its probabilities: every token within 5 standard deviations."""
    rows = 2000
    drawn = np.zeros(200)
    states = [state(SamplingParams(params.temperature, params.top_k, params.top_p, seed=row)) for row in range(rows)]
    for _ in range(10):
        np.add.at(drawn, choose(LOGITS.expand(rows, -1), states), 1)
    expected = transformers_distribution(LOGITS, params)
    deviation = np.sqrt(20_000 * expected * (1 - expected)) + 1e-9
    assert (np.abs(drawn - 20_000 * expected) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("uniform", [0.0, 0.1, 0.49999, 0.5, 0.9999999])
def test_a_number_chooses_by_the_cumulative_distribution(uniform: float) -> None:
    found = Candidates(np.array([4, 9]), np.array([0.5, 0.5]))
    assert found.draw(uniform) == (4 if uniform < 0.5 else 9)
    assert draw_from_all(torch.tensor([[0.0, float("-inf"), 0.0]]), [uniform]) == [0 if uniform < 0.5 else 2]


@pytest.mark.parametrize("width", [100, 8192, 49_152, 50_257])
def test_the_largest_are_found_without_a_sort(width: int) -> None:
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    logits[0, :500] = 9.0  # equals beyond what is asked for
    for count in (1, 20, FIRST):
        found, ids = find_top(logits, count)
        expected = logits.topk(min(count, width)).values
        assert torch.equal(found, expected) and torch.equal(logits.gather(1, ids), found)
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_presence_and_frequency_count_the_text_and_not_the_prompt() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    edited = edit(LOGITS[None], [state(params, (7, 8, 7))])[0]
    expected = LOGITS.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[8] -= 0.5 + 0.25
    torch.testing.assert_close(edited, expected)


def test_ends_are_banned_until_there_are_enough_tokens() -> None:
    params = SamplingParams(min_tokens=2, logit_bias={9: 100.0})
    ending = frozenset({9})
    for generated, banned in (((), True), ((1,), True), ((1, 2), False)):
        token = choose(LOGITS[None], [state(params, generated, ending)])[0]
        assert (token != 9) is banned


@given(st.lists(st.integers(0, 300), max_size=400), st.lists(st.integers(0, 300), max_size=20))
def test_counts_grow_with_the_text(tokens: list[int], before: list[int]) -> None:
    counts = TokenCounts(np.unique(np.array(before, dtype=np.int64)))
    for token in tokens:
        counts.add(token)
    expected = dict.fromkeys(before, 0) | Counter(tokens)
    assert dict(zip(counts.ids.tolist(), counts.times.tolist(), strict=True)) == expected


def test_edits_travel_in_one_array() -> None:
    values = np.array([0.1, -0.0, np.inf, 1e-45, 3.4e38], dtype=np.float32)
    parts = [np.array([2**40, -1]), values, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), np.array([7])]
    for found, part in zip(unpack(torch.from_numpy(pack(parts)), parts), parts, strict=True):
        assert found.numpy().dtype == part.dtype and found.numpy().tobytes() == part.tobytes()


def draws(params: SamplingParams, count: int = 50) -> list[int]:
    """Draws one after another, all from the same logits."""
    one = state(params)
    return [choose(LOGITS[None], [one])[0] for _ in range(count)]


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


def test_texts_of_one_request_have_streams_of_their_own() -> None:
    streams = [[next(Uniforms(5, index)) for _ in range(3)] for index in (0, 1)]
    numbers = [next(stream) for stream in [Uniforms(-5, 0)] for _ in range(200)]
    assert streams[0] != streams[1] and len(set(numbers)) == 200 and all(0 <= number < 1 for number in numbers)


def test_without_a_seed_two_requests_differ() -> None:
    assert draws(SamplingParams(temperature=2.0)) != draws(SamplingParams(temperature=2.0))


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-5, 5e-4])
@pytest.mark.parametrize("rules", [{}, {"top_p": 0.9}, {"top_k": 3, "typical_p": 0.5}])
def test_a_tiny_temperature_stays_finite_and_is_greedy(temperature: float, rules: dict[str, Any]) -> None:
    assert set(draws(SamplingParams(temperature=temperature, **rules))) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.9}, {"top_k": 3}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_own_row_alone(value: float, rules: dict[str, Any]) -> None:
    logits = LOGITS.expand(2, -1).clone()
    logits[0, 5] = value
    states = [state(SamplingParams(temperature=1.0, seed=1, **rules)) for _ in range(2)]
    tokens = choose(logits, states)
    assert [each.fault is not None for each in states] == [True, False]
    assert tokens[1] == choose(LOGITS[None], [state(SamplingParams(temperature=1.0, seed=1, **rules))])[0]


def test_neighbours_change_nothing() -> None:
    """One sequence among greedy, free, ruled and penalized ones, in any row, draws what it draws alone."""
    others = [
        SamplingParams(),
        SamplingParams(1.0),
        SamplingParams(0.5, top_p=0.5),
        SamplingParams(repetition_penalty=2.0),
    ]
    mine = SamplingParams(1.2, top_p=0.95, presence_penalty=0.1, seed=11)
    alone = draws(mine, 20)
    for place in range(5):
        states = [state(params) for params in others]
        states.insert(place, state(mine))
        mixed = [choose(LOGITS.expand(5, -1), states)[place] for _ in range(20)]
        assert mixed == alone


def test_a_neighbours_tiny_temperature_rounds_nothing() -> None:
    alone, beside = LOGITS[None].clone(), LOGITS.expand(2, -1).clone()
    scale(alone, [0.7])
    scale(beside, [0.7, 1e-5])
    assert torch.equal(beside[0], alone[0])
    assert beside[1].max() == 0
    rows, temperatures = LOGITS.expand(2, -1), torch.tensor([[0.7], [1e-5]], dtype=torch.float64)
    on_device, largest = scaled(rows, temperatures, rows.amax(dim=-1, keepdim=True))
    assert torch.equal(on_device, beside) and torch.equal(largest, beside.amax(dim=-1, keepdim=True))


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    expected = torch.log_softmax(logits.float(), dim=-1)
    first, second = report_logprobs(logits, [17, 3], [0, 20])
    assert first.top == () and first.logprob == pytest.approx(expected[0, 17].item(), abs=1e-5)
    top = expected[1].topk(20)
    assert [value for _, value in second.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert [expected[1, token].item() for token, _ in second.top] == pytest.approx(top.values.tolist(), abs=1e-5)
