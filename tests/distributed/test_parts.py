"""One and two real ranks, the real SmolLM2: a long prompt is read in parts, stops nobody and changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsserve.runner.autotp import PAGE_TOKENS
from tests.programs.distributed.parts import ARRIVALS, CANCELLED, LONG, PART, requests
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)  # half a minute on a machine that does nothing else


@pytest.fixture(scope="module", params=[1, 2], ids=["TP=1", "TP=2"])
def leader(request: pytest.FixtureRequest, smollm2: Path) -> dict:
    one_thread = {"OMP_NUM_THREADS": "1"}  # two that wait for each other are slow on a busy machine
    return run_ranks("tests.programs.distributed.parts:texts", request.param, 800, one_thread, path=str(smollm2))[0]


def test_tokens_are_those_of_each_request_alone(leader: dict) -> None:
    for name, alone in leader["alone"].items():
        together = leader["together"][name]
        assert len(alone) == ARRIVALS[name][1]
        assert together == alone[: len(together)]
        assert name in CANCELLED or len(together) == len(alone)
    assert len(leader["together"]["gone"]) > 2 and leader["together"]["left"] == []


def test_tokens_of_the_long_prompt_are_transformers(leader: dict, smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([requests(model.config.vocab_size)["long"].prompt_ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert leader["together"]["long"] == output[0, LONG:].tolist()


def test_rows_that_run_get_a_token_at_each_step_while_a_prompt_is_read(leader: dict) -> None:
    calls = leader["calls"]
    begun = {name: next(at for at, call in enumerate(calls) if name in call) for name in ("first", "short", "long")}
    assert begun["long"] - ARRIVALS["long"][2] == -(-LONG // PART) - 1  # one part a step
    assert all("first" in call for call in calls[begun["first"] : begun["first"] + ARRIVALS["first"][1]])
    assert all(call.count(name) <= 1 for call in calls for name in call)


def test_log_probabilities_of_a_prompt_in_parts_are_those_of_the_whole(leader: dict) -> None:
    parts, whole = leader["echo"]
    assert len(parts) == len(whole) == ARRIVALS["echo"][0] > 2 * PART
    assert [token for token, _ in parts] == [token for token, _ in whole]
    assert parts[0][1] is None and whole[0][1] is None
    assert all(abs(one[1] - other[1]) < 1e-4 for one, other in zip(parts[1:], whole[1:], strict=True))


def test_a_beginning_that_is_reused_is_not_read_again(leader: dict) -> None:
    assert leader["cached"]["again"] == LONG // PAGE_TOKENS * PAGE_TOKENS
    assert leader["cached"]["echo"] == 0
