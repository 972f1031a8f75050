"""Requests through the engine of kernel injection, over the stand-in of the kernels: fp32 tokens are transformers',
alone and in batches; what fails its self-check is refused, or served by AutoTP.
"""

from __future__ import annotations

import pytest

from tests.programs.injection.serve import PROMPT_LENGTHS
from tests.support.ranks import run_ranks

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(
    scope="module",
    params=[("gpt2", 1), ("llama-gqa", 2), pytest.param(("bloom", 2), marks=pytest.mark.long)],
    ids=["gpt2-TP=1", "llama-gqa-TP=2", "bloom-TP=2"],
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    name, ranks = request.param
    # Without g++ on PATH the ranks use gloo: shared memory spins, several times longer beside other programs.
    env = {**ONE_THREAD, "PATH": str(tmp_path_factory.mktemp("path"))}
    return run_ranks("tests.programs.injection.serve:streams", ranks, env=env, name=name)[0]


def test_tokens_are_transformers_alone_and_in_batches(found: dict) -> None:
    assert len({tuple(tokens) for tokens in found["generated"]}) == len(PROMPT_LENGTHS)
    assert found["alone"] == found["generated"]
    assert found["together"] == found["generated"]


def test_a_row_whose_client_left_changes_nothing_for_the_others(found: dict) -> None:
    left, generated = found["left"], found["generated"]
    assert [int(number) for number in left["2"].split()] == generated[2]
    assert [int(number) for number in left["5"].split()] == generated[5]
    assert len(left["0"].split()) < len(generated[0])
    assert (1, 1) in [tuple(pair) for pair in left["running"]]  # the third waits while the second runs
    assert tuple(left["running"][-1]) == (0, 0)


def test_log_probabilities_of_a_padded_prompt_are_transformers(found: dict) -> None:
    assert len(found["logprobs"]) == PROMPT_LENGTHS[1] - 1
    assert found["logprobs"] == pytest.approx(found["expected_logprobs"], abs=1e-4)


@pytest.fixture(scope="module")
def loads() -> dict:
    return run_ranks("tests.programs.injection.serve:loads", 1, env=ONE_THREAD)[0]


def test_auto_serves_by_kernels_that_are_right(loads: dict) -> None:
    assert loads["auto"]["engine"] == "kernels" and loads["auto"]["why"] is None and loads["auto"]["error"] < 1e-5


def test_auto_serves_by_autotp_where_kernels_are_wrong(tmp_path_factory: pytest.TempPathFactory) -> None:
    env = {**ONE_THREAD, "PATH": str(tmp_path_factory.mktemp("path"))}
    for found in run_ranks("tests.programs.injection.serve:fall_back", 2, env=env, name="llama-gqa", wrong=True):
        assert found["engine"] == "autotp" and found["error"] < 1e-5
        assert "self-check failed: kernel injection" in found["why"]


def test_true_refuses_wrong_kernels_with_the_figures(loads: dict) -> None:
    text = loads["true"]
    assert "self-check failed: kernel injection, prefill, changed the logits by" in text and "limit 1e-04" in text


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_weights_of_another_dtype_are_converted_on_their_way(loads: dict, name: str) -> None:
    assert loads[name] == {"dtypes": ["torch.bfloat16"], "equal": True}
