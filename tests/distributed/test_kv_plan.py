"""Ranks that do not see the same memory plan the same KV pages, and serve with them."""

from __future__ import annotations

from pathlib import Path

from scripts.model.random import prepare_random
from tests.support.low_memory import NEW_TOKENS
from tests.support.ranks import run_ranks


def test_ranks_agree_on_the_pages_of_the_one_that_has_least(tmp_path: Path) -> None:
    """A rank's page is 4 KiB in fp32, and two ranks share the memory that each of them sees, of which 0.9 is the KV
    cache's: 2304 pages, and 1152, one of which is the padding's. 40 prompts of 1000 tokens are more than they hold."""
    model = prepare_random("llama-tiny", "fp32", tmp_path)
    arguments = {"device_type": "cpu", "dtype": "fp32", "free_mib": [20, 10], "prompt": 1000, "count": 40}
    leader, other = run_ranks("tests.support.low_memory:serve", 2, path=str(model), **arguments)
    assert leader["tokens"] == other["tokens"] == 1151 * 16 < 40 * 1000
    assert leader["rows"] == other["rows"] == 64
    assert [len(str(text).split()) for text in leader["answers"].values()] == [NEW_TOKENS] * 40
