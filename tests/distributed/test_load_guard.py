"""A load that fails on one rank fails on all, for the same reason, wherever the others are."""

from __future__ import annotations

import pytest

from tests.programs.distributed.guarded import WORDS
from tests.support.ranks import run_ranks

RANKS = "tests.programs.distributed.guarded"


@pytest.fixture(scope="module")
def reasons() -> list[dict[str, str]]:
    return run_ranks(f"{RANKS}:reasons")


@pytest.mark.parametrize("kind", ["before the group", "each another", "at the end", "in a sum"])
def test_all_ranks_have_one_reason(reasons: list[dict[str, str]], kind: str) -> None:
    first, second = (rank[kind] for rank in reasons)
    assert first == second and first and "Connection closed" not in first
    assert kind == "each another" or (WORDS in first and "XForCausalLM" in first and "IndexError" in first)


def test_a_load_that_succeeds_has_none(reasons: list[dict[str, str]]) -> None:
    assert [rank["none"] for rank in reasons] == ["", ""]


def test_the_wait_for_each_other_is_bounded(reasons: list[dict[str, str]]) -> None:
    assert max(float(rank["seconds"]) for rank in reasons) < 20


def test_a_rank_that_cannot_raise_is_ended_with_the_reason_in_its_log() -> None:
    with pytest.raises(RuntimeError) as info:
        run_ranks(f"{RANKS}:stuck", timeout_s=60)
    assert str(info.value).count("LoadError: XForCausalLM cannot be served: IndexError in the stage 'settings'") == 2
