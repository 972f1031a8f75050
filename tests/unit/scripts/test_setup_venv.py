"""Which Python and which torch `make setup` takes. A new machine runs the installation itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scripts import setup_venv
from scripts.setup_venv import CPU_INDEX, ROOT, SetupError, choose_python, choose_torch, read_bounds, translate

BOUNDS = ((3, 10), (3, 15))


def fake_python(folder: Path, name: str, version: str) -> str:
    """A program that answers as an interpreter of this version."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds nothing but what a test puts there."""
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_the_bounds_are_those_of_pyproject() -> None:
    assert read_bounds((ROOT / "pyproject.toml").read_text()) == BOUNDS
    with pytest.raises(SetupError, match="requires-python"):
        read_bounds('requires-python = ">=3.10"\n')


def test_python3_is_taken_where_it_fits(pythons: Path) -> None:
    fake_python(pythons, "python3", "3 12")
    fake_python(pythons, "python3.13", "3 13")
    python, words = choose_python("", BOUNDS)
    assert python == "python3" and "3.12" in words and "3.10 to 3.14 fit" in words


@pytest.mark.parametrize("version", ["3 9", "3 15"])
def test_another_one_is_taken_where_python3_does_not_fit(pythons: Path, version: str) -> None:
    fake_python(pythons, "python3", version)
    fake_python(pythons, "python3.10", "3 10")
    fake_python(pythons, "python3.14", "3 14")
    python, words = choose_python("", BOUNDS)
    assert python == "python3.10" and f"python3 is Python {version.replace(' ', '.')}" in words


def test_no_fitting_python_is_one_line_that_says_which_fit(pythons: Path) -> None:
    with pytest.raises(SetupError, match=r"python3 does not run.*3\.10 to 3\.14 fit"):
        choose_python("", BOUNDS)
    old = fake_python(pythons, "python3", "3 9")
    with pytest.raises(SetupError, match=r"is Python 3\.9.*3\.10 to 3\.14 fit"):
        choose_python("", BOUNDS)
    fake_python(pythons, "python3.12", "3 12")
    with pytest.raises(SetupError, match=r"PYTHON=.* is Python 3\.9"):  # what a user named is not replaced silently
        choose_python(old, BOUNDS)


@pytest.mark.parametrize(
    ("named", "device", "gpu", "reachable", "index", "said"),
    [
        ("", "auto", False, True, CPU_INDEX, "CPU build, since no NVIDIA driver"),
        ("", "auto", False, False, None, "cannot be reached"),
        ("", "auto", True, True, None, "CUDA build, since this machine has"),
        ("", "cpu", True, True, CPU_INDEX, "CPU build, since DEVICE=cpu"),
        ("", "gpu", False, True, None, "CUDA build, since DEVICE=gpu"),
        ("https://example.org/whl", "cpu", True, False, "https://example.org/whl", "TORCH_INDEX"),
    ],
)
def test_the_build_of_torch_follows_the_machine(
    named: str, device: str, gpu: bool, reachable: bool, index: str | None, said: str
) -> None:
    build = choose_torch(named, device, gpu, reachable)
    assert build.index_url == index and said in build.words


def test_pips_settings_reach_the_other_installer() -> None:
    settings = {"index-url": "https://a/simple", "extra-index-url": "https://b https://c", "find-links": "/w /x"}
    environ = translate(settings, CPU_INDEX)
    assert environ["UV_DEFAULT_INDEX"] == "https://a/simple"
    assert environ["UV_INDEX"] == f"https://b https://c {CPU_INDEX}"
    assert environ["UV_FIND_LINKS"] == "/w,/x" and "UV_CONSTRAINT" not in environ
    assert translate({}, None) == {"UV_INDEX_STRATEGY": "unsafe-best-match"}


def test_an_environment_of_a_python_that_does_not_fit_is_not_built_upon(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    fake_python(tmp_path / "bin", "python", "3 9")
    with pytest.raises(SetupError, match="remove the folder"):
        setup_venv.make_venv(sys.executable, tmp_path, BOUNDS)


def test_a_failed_installer_is_followed_by_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are those of a real run; the programs are stand-ins that note how they were called."""
    calls = tmp_path / "calls"
    for name, code in (("python", 0), ("uv", 2)):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit {code}\n')
        path.chmod(0o755)
    installer = setup_venv.Installer(tmp_path / "python", CPU_INDEX)
    installer.install("torch", ["torch"])
    lines = calls.read_text().splitlines()
    assert re.fullmatch(r"uv pip install .*--compile-bytecode -c constraints.txt --quiet torch", lines[-2])
    assert lines[-1].endswith(f"install -c constraints.txt --quiet torch --extra-index-url {CPU_INDEX}")
