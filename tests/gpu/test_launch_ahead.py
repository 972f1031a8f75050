"""Steps that are launched ahead on real GPUs, in CUDA graphs: the same texts as without, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.schedules import make_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("ranks", [1, 2, 4], ids=["tp1", "tp2", "tp4"])
def test_texts_are_those_of_steps_that_wait(tmp_path: Path, ranks: int, share: float) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, {torch.cuda.device_count()} visible")
    make_llama().save_pretrained(tmp_path)
    arguments = {"env": {"DS_ACCELERATOR": "cuda"}, "path": str(tmp_path), "device_type": "gpu"}
    found = run_ranks("tests.programs.distributed.ahead:texts", ranks, seeds=list(range(40)), share=share, **arguments)
    assert found[0]["differences"] == []
    assert all(rank["counts"] == found[0]["counts"] for rank in found)
    steps, ahead, void = found[0]["counts"]
    assert ahead > 0.3 * steps and (void > 0) == (share > 0)
