"""Weight files are known again by their whole content, which is read once as long as nothing touches them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dsserve.loading import weight_source
from dsserve.loading.weight_source import find_changed, look_at, read

NAMES = ["a.safetensors", "b.safetensors"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weight_source, "_PIECE", 1000)
    monkeypatch.setattr(weight_source, "_RACY_NS", 0)
    for name in NAMES:
        (tmp_path / name).write_bytes(os.urandom(10_500))
    (tmp_path / "notes").mkdir()
    return tmp_path


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read from now on."""
    names: list[str] = []
    digest = weight_source.digest

    def count(file: Path, threads: int) -> str:
        names.append(file.name)
        return digest(file, threads)

    monkeypatch.setattr(weight_source, "digest", count)
    return names


def changed(folder: Path, written: dict[str, weight_source.SourceFile]) -> list[str]:
    return find_changed(folder, written, NAMES, folder / "notes", 1)


def test_what_nothing_touched_is_not_read(folder: Path, read_files: list[str]) -> None:
    written = read(folder, NAMES)
    read_files.clear()
    assert changed(folder, written) == [] and read_files == []


@pytest.mark.parametrize("at", [0, 999, 5000, 10_499])
def test_each_byte_counts_though_size_and_time_are_kept(folder: Path, at: int) -> None:
    written, file = read(folder, NAMES), folder / NAMES[1]
    before = file.stat()
    time.sleep(0.02)  # a tick of the clock
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed(folder, written) == [NAMES[1]]


def test_a_copy_is_read_once(folder: Path, read_files: list[str]) -> None:
    written = read(folder, NAMES)
    content = (folder / NAMES[0]).read_bytes()
    (folder / NAMES[0]).unlink()
    (folder / NAMES[0]).write_bytes(content)
    read_files.clear()
    assert changed(folder, written) == [] and read_files == [NAMES[0]]
    read_files.clear()
    assert changed(folder, written) == [] and read_files == []


def test_another_size_needs_no_reading(folder: Path, read_files: list[str]) -> None:
    written = read(folder, NAMES)
    (folder / NAMES[0]).write_bytes(b"short")
    read_files.clear()
    assert changed(folder, written) == [NAMES[0]] and read_files == []


def test_notes_that_cannot_be_written_or_read_cost_time_alone(
    folder: Path, read_files: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    written = {name: file.model_copy(update={"stamp": []}) for name, file in read(folder, NAMES).items()}
    read_files.clear()
    assert find_changed(folder, written, NAMES, folder / "gone", 1) == [] and read_files == NAMES
    assert "every start reads all weights" in caplog.text
    (folder / "notes" / f"seen-{NAMES[0]}.json").write_text("{")
    assert changed(folder, written) == []


def test_a_note_of_other_weights_is_not_believed(folder: Path) -> None:
    first = read(folder, NAMES)
    (folder / NAMES[0]).write_bytes(os.urandom(10_500))
    second = {name: file.model_copy(update={"stamp": []}) for name, file in read(folder, NAMES).items()}
    assert changed(folder, second) == []
    assert changed(folder, first) == [NAMES[0]]


def test_what_has_just_changed_gets_no_stamp(tmp_path: Path) -> None:
    """Two changes within a tick of the clock have one change time."""
    (tmp_path / "a").write_bytes(b"x")
    assert look_at(tmp_path / "a").stamp == []
