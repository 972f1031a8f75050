"""Quantized shards on one and two ranks: the logits of the rounded weights, to the exactness of fp32, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import run_ranks

MODES = ["int8", "int4"]
# Grouped heads; biases of q, k, v; biases everywhere, those of row-parallel layers too; fused q/k/v and gate/up.
NAMES = ["Llama 8/4", "Qwen2 8/4", "OPT 8", "Phi-3 8/4"]
NARROW = "Llama 8/4 narrow"  # its MLP's 240 columns are no whole groups of 32 for any number of ranks
LIMIT = 1e-4
# What rounding alone does to the logits of these weights: less, and nothing was quantized.
CHANGES = {"int8": (2e-3, 0.1), "int4": (2e-2, 0.7)}

Outcomes = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=[1, 2], ids=["TP=1", "TP=2"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = str(tmp_path_factory.mktemp("quantized"))
    # Without g++ on PATH two ranks use gloo: shared memory spins, several times longer beside other programs.
    arguments = {"folder": folder, "names": [*NAMES, NARROW], "modes": MODES, "env": {"PATH": folder}}
    return run_ranks("tests.programs.distributed.quantized:outcomes", request.param, **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_rounded_weights(outcomes: Outcomes, name: str, mode: str) -> None:
    for found in (rank[f"{name} {mode}"] for rank in outcomes):
        assert "refused" not in found and found["largest"] > 1
        assert found["rounded"] < LIMIT and found["engine"] < LIMIT
        assert CHANGES[mode][0] < found["change"] < CHANGES[mode][1]


def test_int4_refuses_shards_that_are_no_whole_groups(outcomes: Outcomes) -> None:
    """On all ranks, also on those whose shards would do: two ranks get 128 and 112 of the 240 columns."""
    refusals = [rank[f"{NARROW} int4"]["refused"] for rank in outcomes]
    expected = ["[128, 240]"] if len(outcomes) == 1 else ["another rank", "[128, 112]"]
    assert all(word in text for word, text in zip(expected, refusals, strict=True))
    assert all(rank[f"{NARROW} int8"]["rounded"] < LIMIT for rank in outcomes)
