"""Ranks that do not see the same memory plan the same KV rows, and serve with them."""

from __future__ import annotations

from pathlib import Path

from scripts.model.random import prepare_random
from tests.support.low_memory import NEW_TOKENS
from tests.support.ranks import run_ranks


def test_ranks_agree_on_the_slots_of_the_one_that_has_least(tmp_path: Path) -> None:
    """A rank's row is 1 MiB in fp32, and two ranks share the memory that each of them sees: 9 rows, and 4."""
    model = prepare_random("llama-tiny", "fp32", tmp_path)
    arguments = {"device_type": "cpu", "dtype": "fp32", "free_mib": [20, 10], "prompt": 30, "count": 9}
    leader, other = run_ranks("tests.support.low_memory:serve", 2, path=str(model), **arguments)
    assert leader["slots"] == other["slots"] == 4
    assert [len(str(text).split()) for text in leader["answers"].values()] == [NEW_TOKENS] * 9
