"""Two ranks end a load that cannot succeed with one reason, also where one fails alone; and they sum without an op."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny_models import save_model

RANKS = "tests.distributed.loading"
# The router of the last one is cut: rank 1 fails where rank 0 waits for it.
REFUSED = {
    "gpt_bigcode": ["GPTBigCodeForCausalLM", "RuntimeError", "2 ranks"],
    "hunyuan": ["HunYuanDenseV1ForCausalLM", "DeepSpeed refuses", "nproc-per-node"],
    "falcon_rw": ["FalconForCausalLM", "2 ranks"],
    "qwen3_next": ["Qwen3NextForCausalLM", "states of their own"],
    "phimoe": ["PhimoeForCausalLM", "2 ranks"],
}


@pytest.fixture(scope="module")
def reasons(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folders = {name: str(save_model(tmp_path_factory.mktemp(name), name)) for name in REFUSED}
    # Without g++ on PATH the ranks use gloo: a rank that waits in shared memory cannot raise and is ended.
    return run_ranks(f"{RANKS}:reasons", folders=folders, env={"PATH": str(tmp_path_factory.mktemp("path"))})


@pytest.mark.parametrize("name", REFUSED)
def test_all_ranks_give_one_reason(reasons: list[dict[str, str]], name: str) -> None:
    first, second = (rank[name] for rank in reasons)
    assert first == second and "\n" not in first
    assert all(word in first for word in REFUSED[name]) and "Connection closed" not in first


def test_a_rank_that_cannot_compile_makes_all_use_gloo(tmp_path: Path) -> None:
    first, second = run_ranks(f"{RANKS}:sum_without_op", broken=[1])
    assert first["sum"] == second["sum"] == 3
    assert not first["shared_memory"] and not second["shared_memory"]
    assert [("all-reduce over gloo" in line, "cannot be built" in line) for line in first["lines"]] == [(True, True)]
    assert second["lines"] == []
