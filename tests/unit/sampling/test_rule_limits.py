"""Each rule at its limits, and numbers beyond any: what is kept, on the host and on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dsserve.core.request import GenerationRequest, SamplingParams
from dsserve.sampling.filters import find_candidates
from dsserve.sampling.gpu_draw import row_numbers
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.penalties import RowEdits, edit_logits
from dsserve.sampling.pending import HostChoice
from dsserve.sampling.rules import RULES, Likeliest, limits_of
from dsserve.sampling.sampler import SamplingState, choose, edit

CPU, OFF = torch.device("cpu"), float("-inf")
# Probabilities that fp64 holds exactly: 1/2, 1/4, 1/8, 1/8 of tokens 1, 3, 5, 7, in natural logarithms.
HALVES = [OFF, 0.0, OFF, -np.log(2), OFF, -2 * np.log(2), OFF, -2 * np.log(2)]
EQUAL = [OFF, 0.0, OFF, 0.0, OFF, 0.0, OFF, 0.0]


def kept(logits: list[float], width: int, **rules: Any) -> list[int]:
    """The ids that may be drawn from these logits, among others that are banned."""
    row = torch.full((1, width), OFF)
    row[0, : len(logits)] = torch.tensor(logits)
    (found,) = find_candidates(row, [SamplingParams(1.0, **rules)])
    return [] if found.is_empty else found.ids.tolist()


@pytest.mark.parametrize(
    ("logits", "rules", "ids"),
    [
        (HALVES, {"min_p": 1.0}, [1]),
        (EQUAL, {"min_p": 1.0}, [1, 3, 5, 7]),
        (EQUAL, {"min_p": 0.0}, [1, 3, 5, 7]),
        (HALVES, {"min_p": 0.0}, [1, 3, 5, 7]),
        (HALVES, {"min_p": 0.4999}, [1, 3]),
        (HALVES, {"min_p": 0.5001}, [1]),
        (HALVES, {"top_p": 1.0}, [1, 3, 5, 7]),
        (HALVES, {"top_p": 1 - 2**-53}, [1, 3, 5, 7]),
        ([0.0, -50.0, OFF], {"top_p": 1.0}, [0, 1]),  # which the sum of the first does not show
        ([0.0, -50.0, OFF], {"typical_p": 1.0}, [0, 1]),
        (HALVES, {"top_p": 0.0}, [1]),
        (HALVES, {"top_p": 5e-324}, [1]),
        (HALVES, {"top_p": 1e-9}, [1]),
        (HALVES, {"top_p": 0.4999}, [1]),
        (HALVES, {"top_p": 0.5001}, [1, 3]),
        (EQUAL[:4], {"top_p": 0.5001}, [1, 3]),
        (HALVES, {"typical_p": 1.0}, [1, 3, 5, 7]),
        (EQUAL, {"typical_p": 1e-9}, [1, 3, 5, 7]),  # all equally near
        (HALVES, {"typical_p": 1e-9}, [3]),  # its information, 2 bits, is nearest to the entropy of 1.75
        (HALVES, {"typical_p": 0.2501}, [1, 3]),
        (HALVES, {"top_k": 1}, [1]),
        (EQUAL, {"top_k": 1}, [1, 3, 5, 7]),  # equals of the last one stay, as in transformers
        (HALVES, {"top_k": 3}, [1, 3, 5, 7]),
        (HALVES, {"top_k": 2}, [1, 3]),
        (HALVES, {"top_k": 1, "top_p": 5e-324, "min_p": 1.0, "typical_p": 1e-9}, [1]),
    ],
)
@pytest.mark.parametrize("width", [8, 128, 129, 40_000])
def test_what_a_rule_keeps_at_its_limit(logits: list[float], rules: dict[str, Any], ids: list[int], width: int) -> None:
    if len(logits) <= width:
        assert kept(logits, width, **rules) == ids


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.7501, 4), (1.0, 4)])
@pytest.mark.parametrize("width", [8, 40_000])
def test_a_token_at_which_top_p_is_reached_exactly_is_the_last_one(top_p: float, count: int, width: int) -> None:
    assert len(kept(EQUAL, width, top_p=top_p)) == count


@pytest.mark.parametrize(("typical_p", "kept"), [(0.25, [1]), (0.2501, [0, 1]), (0.75, [0, 1]), (0.7501, [0, 1, 2, 3])])
def test_a_token_at_which_typical_p_is_reached_exactly_is_the_last_one(typical_p: float, kept: list[int]) -> None:
    """Of weights that fp64 holds exactly, which logits do not give."""
    weights, nothing = np.array([[0.5, 0.25, 0.125, 0.125]]), np.zeros((1, 1), bool)
    rows = Likeliest(weights, weights, True, weights.sum, np.ones((1, 4), bool), nothing)
    (rule,) = (rule for rule in RULES if rule.name == "typical_p")
    rule.host(rows, np.array([[typical_p]]))
    assert np.flatnonzero(rows.keep[0]).tolist() == kept


@pytest.mark.parametrize("width", [100, 128, 129, 20_000])
@pytest.mark.parametrize("more", [0, 1, 1000, 2**31, 2**63, 2**64, 10**30, 10**400])
def test_a_top_k_of_the_vocabulary_or_more_keeps_all(width: int, more: int) -> None:
    logits = torch.linspace(0, 3, width)[None]
    (found,) = find_candidates(logits, [SamplingParams(1.0, top_k=width + more)])
    assert len(found.ids) == width
    (one_less,) = find_candidates(logits, [SamplingParams(1.0, top_k=width - 1)])
    assert len(one_less.ids) == width - 1


WISHES: list[dict[str, Any]] = [
    {"min_p": 1.0}, {"min_p": 0.0}, {"top_p": 1.0}, {"top_p": 5e-324}, {"top_p": 0.5}, {"top_p": 1 - 2**-53},
    {"typical_p": 1.0}, {"typical_p": 0.5}, {"typical_p": 1e-9}, {"top_k": 1}, {"top_k": 127}, {"top_k": 128},
    {"top_k": 10**400}, {"top_k": 2, "min_p": 1.0}, {"temperature": 10**400}, {"temperature": 1e308},
    {"temperature": 1e300, "top_p": 0.5}, {"min_p": 10**400}, {"top_p": 10**400},
]  # fmt: skip


@pytest.mark.parametrize("rules", WISHES, ids=str)
@pytest.mark.parametrize("logits", [HALVES, EQUAL, EQUAL[:2], [0.0] * 300, list(np.linspace(0, 9, 300))])
@pytest.mark.parametrize("width", [8, 200])
def test_both_samplers_draw_the_same_at_a_limit_and_never_what_is_banned(
    logits: list[float], rules: dict[str, Any], width: int
) -> None:
    row = torch.full((1, width), OFF)
    row[0, : min(width, len(logits))] = torch.tensor(logits[:width])
    rows = row.expand(40, -1)
    params = [SamplingParams(**{"temperature": 1.0, "seed": seed, **rules}) for seed in range(40)]
    states, own = ([SamplingState(GenerationRequest("r", (1,), 9, one)) for one in params] for _ in range(2))
    expected, found = HostChoice(rows, states).read(), DeviceSampler(40, width, CPU).launch(rows, own).read()
    assert found == expected
    assert not any(state.fault for state in [*states, *own])
    assert all(row[0, token] > OFF for token in found)


def test_a_place_beyond_the_rounded_sum_is_no_banned_token() -> None:
    row = torch.full((1, 20), OFF)
    row[0, 2:12] = 0.0  # the sum of ten tenths is less than one
    (found,) = find_candidates(row, [SamplingParams(1.0, min_p=0.0)])
    assert np.cumsum(found.probabilities)[-1] <= 1 - 2**-53 and found.draw(1 - 2**-53) == 11


def test_numbers_of_any_size_make_arrays_of_numbers() -> None:
    params = SamplingParams(10**400, 10**400, 10**400, 10**400, 10**400)
    assert all(type(limit) is float for limit in (*limits_of(params), *limits_of(SamplingParams())))
    assert all(isinstance(number, float) for number in row_numbers(params))
    low = replace(params, temperature=-1.0, top_k=-5, top_p=-1.0, min_p=-1.0, typical_p=-1.0)
    assert limits_of(low) == (1, 0, 0, 0)


# Ids of the row before, of the row behind, of none at all.
OUTSIDE = (-1, -10, 10, 11, 19, 10**9)


@pytest.mark.parametrize("token", OUTSIDE)
def test_ids_beyond_the_vocabulary_touch_no_other_row(token: int) -> None:
    """End-of-text and stop tokens under min_tokens, bias, and prompts under a repetition penalty."""
    wishes = SamplingParams(logit_bias={token: 5.0, 4: 1.0}, repetition_penalty=2.0, min_tokens=3)
    edits = RowEdits(wishes, (token, 6), frozenset({token, 5}))
    plain = RowEdits(SamplingParams(), (1,), frozenset())
    logits = torch.linspace(1, 2, 30).reshape(3, 10)
    expected = logits.clone()
    expected[1, 4] += 1
    expected[1, 6] /= 2
    expected[1, 5] = OFF
    edit_logits(logits, [plain, edits, plain])
    assert torch.equal(logits, expected)


def test_an_end_of_text_id_beyond_the_vocabulary_bans_no_token_of_the_next_row() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 2] = 9.0
    request = GenerationRequest("r", (1,), 9, SamplingParams(min_tokens=3))
    states = [SamplingState(request, frozenset({12})), SamplingState(GenerationRequest("r", (1,), 9))]
    assert choose(logits, states) == [2, 2]
    assert torch.equal(edit(logits, states), logits)


def test_a_grammars_mask_is_as_wide_as_the_row() -> None:
    class Grammar:
        def allowed(self, width: int) -> np.ndarray:
            return np.arange(width + 5) < 3

    states = [SamplingState(GenerationRequest("r", (1,), 9)) for _ in range(2)]
    states[0].grammar = Grammar()  # type: ignore[assignment]
    assert choose(torch.ones(2, 10), states)[1] == 0
    assert states[0].fault is not None and states[1].fault is None
