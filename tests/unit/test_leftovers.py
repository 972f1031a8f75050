"""What a start sweeps: leftovers of dead owners, and nothing else."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

from dsserve.leftovers import own_temporary_folder, sweep

OLD_S = time.time() - 3600


def make(path: Path, age: float = OLD_S) -> Path:
    path.write_bytes(b"\0" * 4096)
    os.utime(path, (age, age))
    return path


def test_only_old_segments_of_ours_that_nobody_maps_are_removed(tmp_path: Path) -> None:
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_"
    dead, young, mapped = (
        make(tmp_path / f"{name}0"),
        make(tmp_path / f"{name}1", time.time()),
        make(tmp_path / f"{name}2"),
    )
    strange = make(tmp_path / f"deepspeed_allreduce_buffer_{os.getuid() + 1}_127.0.0.1_29500_0")
    other = make(tmp_path / "nccl-abc")
    with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert sweep(None, shared_memory=tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([young, mapped, strange, other])


def test_torchruns_folders_go_with_their_torchrun(tmp_path: Path) -> None:
    dead, alive = tmp_path / "torchelastic_dead", tmp_path / "torchelastic_alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "error.json").write_text("{}")
        os.utime(folder, (OLD_S, OLD_S))
    environ = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(alive / "attempt_0" / "error.json")}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=environ, stdin=subprocess.PIPE) as rank:
        assert sweep(tmp_path, shared_memory=tmp_path / "none") == [dead]
        rank.kill()
    assert not dead.exists() and alive.exists()


def test_a_temporary_folder_that_is_shared_is_left_alone(monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.delenv("DSSERVE_RUN_DIR", raising=False)
    assert own_temporary_folder() is None
    monkeypatch.setenv("DSSERVE_RUN_DIR", "/run/x")
    assert own_temporary_folder() == Path("/tmp")
