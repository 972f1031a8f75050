"""Sums in the memory of real GPUs, in CUDA graphs, round after round: right, and the same on all ranks."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import run_ranks

# Row counts that take turns, their width, dtype, rounds. Of 4096 rows a GPU does not run all programs at once.
CASES = (
    ([1], 4096, "bfloat16", 200), ([64], 4096, "float16", 200), ([5], 768, "float32", 200),
    ([3], 1000, "bfloat16", 200),
    ([320], 8192, "bfloat16", 100), ([4096], 4096, "bfloat16", 20), ([1, 64, 4096, 8], 4096, "bfloat16", 40),
)  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4], ids=["tp2", "tp4"])
def test_sums_are_right_and_the_same_on_all_ranks(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, {torch.cuda.device_count()} visible")
    for rank in run_ranks("tests.programs.gpu.steps:sum_parts", ranks, env={"DS_ACCELERATOR": "cuda"}, cases=CASES):
        for (*_, rounds), found in zip(CASES, rank, strict=True):
            assert found == {"places": 2, "right": rounds}
