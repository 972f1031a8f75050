"""The real SmolLM2 with quantized shards: two ranks are as near to the exact logits as one, and so is the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks

# Mode and dtype -> bounds of the relative error against the exact logits in fp32. The lower ones are above what the
# dtype does by itself; int4's is low since the demo's weights were made of 4-bit groups of 32.
BOUNDS = {("int8", "fp32"): (1e-2, 8e-2), ("int8", "bf16"): (1e-2, 8e-2), ("int4", "bf16"): (1e-2, 8e-2)}
# The engine adds up in another order; of the quantized model's logits it may not move more than the dtype does.
ENGINE = {"fp32": 1e-4, "bf16": 3e-2}

Results = list[list[dict]]  # [mode][rank]


@pytest.fixture(scope="module")
def results(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    # Without g++ on PATH two ranks use gloo: shared memory spins, several times longer beside other programs.
    arguments = {"path": str(smollm2), "modes": list(BOUNDS), "env": {"PATH": str(tmp_path_factory.mktemp("empty"))}}
    step = "tests.distributed.steps:quantized_logits"
    return {ranks: list(zip(*run_ranks(step, ranks, **arguments), strict=True)) for ranks in (1, 2)}


@pytest.mark.parametrize("index", range(len(BOUNDS)), ids=["-".join(key) for key in BOUNDS])
def test_two_ranks_are_as_exact_as_one(results: dict[int, Results], index: int) -> None:
    (mode, dtype), (low, high) = list(BOUNDS.items())[index]
    one, two = results[1][index][0], results[2][index]
    for rank in (one, *two):
        assert low < rank["error"] < min(high, 1.3 * one["error"]), mode
        assert rank["engine"] < ENGINE[dtype]
    assert two[0]["logits"] == two[1]["logits"]
    alone, shared, exact = (torch.tensor(rows) for rows in (one["logits"], two[0]["logits"], one["exact"]))
    assert (shared - alone).norm() < 1.5 * (alone - exact).norm()  # two roundings of the same weights
