"""Two ranks end a load that cannot succeed with one reason, also where one fails alone, and sum without an op."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_model

RANKS = "tests.programs.distributed.loading"
REFUSED = {
    "gpt_bigcode": ["GPTBigCodeForCausalLM", "RuntimeError", "2 ranks"],
    "hunyuan": ["HunYuanDenseV1ForCausalLM", "DeepSpeed refuses", "nproc-per-node"],
    "falcon_rw": ["FalconForCausalLM", "2 ranks"],
    "qwen3_next": ["Qwen3NextForCausalLM", "states of their own"],
}


@pytest.fixture(scope="module")
def reasons(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folders = {name: str(save_model(tmp_path_factory.mktemp(name), name)) for name in REFUSED}
    return run_ranks(f"{RANKS}:reasons", folders=folders)


@pytest.mark.parametrize("name", REFUSED)
def test_all_ranks_give_one_reason(reasons: list[dict[str, str]], name: str) -> None:
    first, second = (rank[name] for rank in reasons)
    assert first == second and "\n" not in first
    assert all(word in first for word in REFUSED[name]) and "Connection closed" not in first


@pytest.mark.long
def test_a_rank_that_waits_for_one_that_failed_ends_with_its_reason(tmp_path: Path) -> None:
    """The router of this model is cut: rank 1 fails within a layer, and rank 0 waits for it in a sum of DeepSpeed's."""
    with pytest.raises(RuntimeError) as info:
        run_ranks(f"{RANKS}:reasons", folders={"phimoe": str(save_model(tmp_path, "phimoe"))})
    said = str(info.value)
    assert said.count("LoadError: PhimoeForCausalLM cannot run after DeepSpeed's sharding over 2 ranks") == 2
    assert "Connection closed" not in said


def test_a_rank_that_cannot_compile_makes_all_use_gloo(tmp_path: Path) -> None:
    first, second = run_ranks(f"{RANKS}:sum_without_op", broken=[1])
    assert first["sum"] == second["sum"] == 3
    assert not first["shared_memory"] and not second["shared_memory"]
    assert [("all-reduce over gloo" in line, "cannot be built" in line) for line in first["lines"]] == [(True, True)]
    assert second["lines"] == []
