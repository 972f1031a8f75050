"""Kernel injection without a GPU: DeepSpeed's layers in our adapters, over a stand-in of the kernels, are transformers'
models to 1e-4 in fp32, or are refused. What the kernels themselves compute on a GPU is `tests/programs/gpu/parity.py`'s
affair.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.programs.injection.cases import DECODER_CASES, ENCODER_CASES
from tests.programs.injection.models import ENCODERS
from tests.support.ranks import run_ranks

# Ranks -> architectures; `python -m tests.programs.injection.table` runs all of them on any number of ranks.
ON_RANKS = {
    1: ("gpt2", "opt-post", "llama-80", "distilbert"),
    2: ("opt", "gptj", "gpt_neo", "llama-gqa", "bloom", "gpt_neox-80", "bert"),
    3: ("opt-9", "gpt2"),
}
HEADS = {"opt-9": 9}
SHAPES = [(ranks, name) for ranks, names in ON_RANKS.items() for name in names]
# One thread a rank: torch's threads of several ranks wait for each other's cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """Ranks -> rank -> architecture -> case -> what it gave; one start of the ranks for each number of them."""
    # Without g++ on PATH the ranks use gloo: shared memory spins, several times longer beside other programs.
    env = {**ONE_THREAD, "PATH": str(tmp_path_factory.mktemp("path"))}
    return {
        ranks: run_ranks(
            "tests.programs.injection.cell:run_cells", ranks, timeout_s=280, env=env, names=list(names), dtype="fp32"
        )
        for ranks, names in ON_RANKS.items()
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ranks", "name"), SHAPES)
def test_every_case_is_transformers_or_refused(matrix: dict[int, list[Any]], ranks: int, name: str) -> None:
    for rank in matrix[ranks]:
        found = rank[name]
        heads = HEADS.get(name, 8)
        if heads % ranks:
            assert f"{heads} attention heads on {ranks} ranks" in found["refused"]
            continue
        assert list(found) == list(ENCODER_CASES if name in ENCODERS else DECODER_CASES)
        wrong = {case: result for case, result in found.items() if not result["passes"]}
        assert not wrong


# The stand-in has the kernels' faults, so that these tests would notice a repair that went missing.
REPAIRS = [
    ("replace_operations", "llama"),
    ("repair_config", "opt-post"),
    ("repair_config", "gpt_neox"),
    ("repair_config", "distilbert"),
]


@pytest.fixture(scope="module")
def without_repairs() -> list[str]:
    return run_ranks("tests.programs.injection.cell:run_without", 1, env=ONE_THREAD, left_out=REPAIRS)[0]


@pytest.mark.parametrize("at", range(len(REPAIRS)), ids=[f"{repair}-{name}" for repair, name in REPAIRS])
def test_without_its_repair_an_architecture_fails_its_self_check(without_repairs: list[str], at: int) -> None:
    assert "self-check failed: kernel injection" in without_repairs[at]
