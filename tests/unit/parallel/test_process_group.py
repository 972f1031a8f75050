"""Where DeepSpeed's all-reduce cannot be had, its reason is found before DeepSpeed would die of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder

from dsserve.parallel import process_group
from dsserve.parallel.rank import RankInfo, prepare_environment


def unwritable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "file" / "extensions"))


def compiler_that_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    monkeypatch.setenv("CXX", "/bin/false")


@pytest.mark.parametrize("spoil", [unwritable, compiler_that_fails])
def test_an_all_reduce_that_cannot_be_built_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object
) -> None:
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    assert callable(spoil)
    spoil(monkeypatch, tmp_path)
    reason = process_group._why_not_built()
    assert reason is not None and "cannot be built" in reason and "\n" not in reason


@pytest.mark.parametrize("threads", [1, 3])
def test_the_settings_threads_count(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        prepare_environment(torch.device("cpu"), RankInfo(0, 0, 1, 1), threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
