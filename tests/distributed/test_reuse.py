"""Two real ranks, the real SmolLM2: pages that texts share change no token, neither do neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs.distributed.reuse import CACHED
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def leader(smollm2: Path) -> dict:
    return run_ranks("tests.programs.distributed.reuse:texts", path=str(smollm2))[0]


def test_a_good_part_of_the_prompts_was_not_computed_again(leader: dict) -> None:
    assert leader["cached"] == CACHED


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_tokens_are_those_of_each_request_alone(leader: dict, kind: str) -> None:
    assert len(set(leader[kind]["alone"])) == len(leader[kind]["alone"])
    assert leader[kind]["together"] == leader[kind]["alone"]
