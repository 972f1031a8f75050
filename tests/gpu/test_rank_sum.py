"""The ranks' sums in each other's memory on two real GPUs: bit for bit NCCL's, in CUDA graphs, round after round."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 4096, "bfloat16"), (64, 4096, "float16"), (5, 768, "float32"), (3, 1000, "bfloat16")],
)
def test_as_nccl_and_the_same_on_all_ranks(rows: int, width: int, dtype: str) -> None:
    arguments = {"env": {"DS_ACCELERATOR": "cuda"}, "rows": rows, "width": width, "dtype": dtype, "rounds": 200}
    for found in run_ranks("tests.gpu.steps:sum_parts", 2, **arguments):
        assert found["places"] == 2 and not found["is_late"]
        assert found["right"] == [True] * 200
