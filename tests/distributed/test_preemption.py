"""One and two real ranks with fewer pages than their texts want: who loses them is computed again, to the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.schedules import make_llama

pytestmark = pytest.mark.timeout(900)  # half a minute on a machine that does nothing else
SEEDS = list(range(100, 106))


@pytest.mark.parametrize("ranks", [1, 2], ids=["TP=1", "TP=2"])
def test_texts_are_those_of_each_alone_and_all_ranks_follow_the_same_plans(tmp_path: Path, ranks: int) -> None:
    make_llama().save_pretrained(tmp_path)
    one_thread = {"OMP_NUM_THREADS": "1"}
    found = run_ranks(
        "tests.programs.distributed.preemption:texts", ranks, 800, one_thread, path=str(tmp_path), seeds=SEEDS
    )
    leader = found[0]
    assert leader["differences"] == []
    assert sum(count > 0 for count in leader["preemptions"]) > len(SEEDS) // 2 and sum(leader["preemptions"]) > 12
    assert all(rank["plans"] == leader["plans"] and rank["steps"] == leader["steps"] > 200 for rank in found)
