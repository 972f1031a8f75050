"""What a start sweeps: leftovers of dead owners, and nothing else."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsserve.worker.cleanup import sweep, sweep_build_locks, torchrun_log_folder

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


def test_torchruns_folders_go_with_their_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "torchelastic_ts"
    dead, alive = logs / "m_29500_dead", logs / "m_29500_alive"
    for folder in (dead, alive):
        (folder / "attempt_0" / "0").mkdir(parents=True)
        os.utime(folder, (OLD_S, OLD_S))
    error_file = str(alive / "attempt_0" / "0" / "error.json")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
    assert torchrun_log_folder() == logs
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as rank:
        assert sweep(logs, shared_memory=tmp_path / "none") == [dead]
        rank.kill()
    assert not dead.exists() and alive.exists()


def test_folders_of_another_torchrun_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/attempt_0/0/error.json")
    assert torchrun_log_folder() is None
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert torchrun_log_folder() is None


def test_a_lock_of_a_dead_compilation_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    for name in ("dead", "living", "young"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
    dead, living, young = (
        make(tmp_path / "py311_cpu" / "dead" / "lock"),
        make(tmp_path / "py311_cpu" / "living" / "lock"),
        make(tmp_path / "py311_cpu" / "young" / "lock", time.time()),
    )
    compiler = subprocess.Popen([sys.executable, "-c", "input()"], cwd=living.parent, stdin=subprocess.PIPE)
    try:
        assert sweep_build_locks(tmp_path) == [dead]
    finally:
        compiler.communicate(b"\n")
    assert living.exists() and young.exists()
    assert sweep_build_locks(tmp_path) == [living]


def test_a_lock_of_a_compilation_on_another_host_stays(tmp_path: Path) -> None:
    """No process of it is seen here: old as the lock is, its folder's files change, or our lock in it is held."""
    compiled, guarded = tmp_path / "compiled", tmp_path / "guarded"
    for folder in (compiled, guarded):
        folder.mkdir()
        make(folder / "lock", time.time() - 120)
    (compiled / "part.o").touch()
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); f.write('compiling\\n'); f.flush(); "
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(guarded / "dsserve.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert sweep_build_locks(tmp_path) == []
        other.kill()
    assert sweep_build_locks(tmp_path) == [guarded / "lock"]
