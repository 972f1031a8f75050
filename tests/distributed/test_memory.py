"""A prompt for which one rank has not the memory fails alone, and the ranks go on together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs.distributed.memory import NEW_TOKENS
from tests.support.ranks import run_ranks

STEPS = "tests.programs.distributed.memory"


@pytest.fixture(scope="module")
def leader(smollm2: Path) -> dict:
    return run_ranks(f"{STEPS}:answers", path=str(smollm2))[0]


def test_the_prompt_that_does_not_fit_gets_507(leader: dict) -> None:
    assert leader["scarce"]["long"] == 507


def test_all_others_get_their_own_tokens(leader: dict) -> None:
    """Also three that fit alone and not in one pass."""
    others = {name: text for name, text in leader["scarce"].items() if name != "long"}
    assert others == leader["alone"]
    assert len(others) == 5 and all(len(text.split()) == NEW_TOKENS for text in others.values())


def test_the_engine_ends_where_prompts_fail_that_had_room_at_load(smollm2: Path) -> None:
    (words,) = run_ranks(f"{STEPS}:give_up", world_size=1, path=str(smollm2))
    assert "fitted at load" in words


def test_a_load_without_memory_for_the_first_passes_ends_on_all_ranks_and_says_so(smollm2: Path) -> None:
    for words in run_ranks(f"{STEPS}:load", path=str(smollm2)):
        assert "no memory to read 64 tokens" in words and "max_model_len" in words
