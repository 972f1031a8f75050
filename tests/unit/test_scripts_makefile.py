"""What the Makefile derives from its variables. Nothing is run (`make -n`)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.prepare_model import ROOT


def dry_run(*words: str) -> str:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2", "smollm2"),
        ("/data/My-Model_1.5/", "My-Model_1.5"),
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/data/odd,name:x", "odd-name-x"),
    ],
)
def test_the_served_name_follows_from_the_model(model: str, name: str) -> None:
    output = dry_run("mar", "start", f"MODEL={model}", f"PYTHON={sys.executable}")
    assert f"--name '{name}' --model '{model}'" in output
    assert f"--run-dir 'run/{name}-8080'" in output
    assert f"model-store/{name}.mar" in output


def test_deploy_does_everything_in_order() -> None:
    lines = [line for line in dry_run("deploy", f"PYTHON={sys.executable}", "TP=1", "PORT=9090").splitlines() if line]
    scripts = [word for line in lines for word in line.split() if word.startswith("scripts.")]
    assert scripts == ["scripts.build_ops", "scripts.package", "scripts.serve", "scripts.ask"]
    assert sum("--tp '1'" in line for line in lines) == 1
    assert sum("--port '9090'" in line for line in lines) == 2


def test_a_complete_python_is_used_and_nothing_is_installed() -> None:
    output = dry_run("setup", f"PYTHON={sys.executable}")
    assert "pip" not in output
    assert "venv .venv" not in output
    assert f"{sys.executable} -m scripts.build_ops" in output


def test_the_ci_script_calls_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
