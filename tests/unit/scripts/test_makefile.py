"""What the Makefile makes of its variables: `make -n`, and real runs with a false Python that writes its words down."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common.paths import ROOT

# Variables that a user sets, but PYTHON.
GIVEN = {
    "MODEL", "NAME", "VERSION", "TP", "DEVICE", "DTYPE", "PORT", "HOST", "TOKENS", "RUN_DIR", "DRAIN", "MINUTES",
    "SHAPE", "REVISION", "PARTS", "ARGS", "QUESTION",
}  # fmt: skip
# Target -> the variables that its command gets as words of their own.
TARGETS = {
    "cpu-ops": {"DEVICE"},
    "ops": {"DEVICE"},
    "model": {"MODEL"},
    "download": {"MODEL", "REVISION"},
    "shard": {"NAME", "MODEL", "TP", "DTYPE"},
    "mar": {"NAME", "MODEL", "VERSION", "TP", "DEVICE", "DTYPE"},
    "start": {"RUN_DIR", "NAME", "PORT", "HOST"},
    "run": {"RUN_DIR", "NAME", "PORT", "HOST", "DRAIN"},
    "stop": {"RUN_DIR", "PORT", "DRAIN"},
    "health": {"NAME", "PORT", "HOST", "RUN_DIR"},
    "token": {"RUN_DIR", "PORT"},
    "rollout": {"RUN_DIR", "NAME", "PORT"},
    "status": {"RUN_DIR", "PORT"},
    "logs": {"RUN_DIR", "PORT"},
    "ask": {"NAME", "PORT", "HOST", "RUN_DIR", "QUESTION"},
    "bench": {"MODEL", "TP", "DEVICE", "DTYPE"},
    "bench-gpu": {"SHAPE", "TP", "DEVICE", "DTYPE", "PARTS", "ARGS"},
    "bench-failover": {"MODEL", "DTYPE"},
    "soak": {"MINUTES"},
}
HOSTILE = [
    "a'; touch {mark}; echo '",
    'a"; touch {mark}; echo "',
    "a b; touch {mark} #",
    "$(shell touch {mark})",
    "$$(touch {mark}) $(touch {mark}) ${{HOME}} $HOME",
    "`touch {mark}`",
    "a\ntouch {mark}\n",
    "a\\'; touch {mark} & | > {mark} * ? ~ \\",
    "-x",
]


def clean_environment() -> dict[str, str]:
    """Without what a make above this test passed on."""
    return {
        name: value for name, value in os.environ.items() if name not in {*GIVEN, "PYTHON", "MAKEFLAGS", "MAKELEVEL"}
    }


def make(*words: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environ = clean_environment() | (environ or {})
    return subprocess.run(["make", *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def dry_run(*words: str) -> str:
    done = make("-n", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def false_python(path: Path, calls: Path, lacks: str = "nothing") -> Path:
    """An interpreter that says what it lacks, appends its words to `calls`, and does nothing else."""
    append = f'printf \'%s\\0\' "$#" "$@" >> {shlex.quote(str(calls))}'
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {lacks}; else {append}; fi\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def python(tmp_path: Path, calls: Path) -> str:
    return f"PYTHON={false_python(tmp_path / 'python', calls)}"


def words_of(calls: Path) -> list[list[str]]:
    """The words of each call, in turn."""
    left, found = calls.read_text().split("\0")[:-1], list[list[str]]()
    while left:
        count = int(left[0])
        found.append(left[1 : 1 + count])
        left = left[1 + count :]
    return found


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2", "smollm2"),
        ("/data/My-Model_1.5/", "My-Model_1.5"),
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/data/odd,name:x", "odd-name-x"),
        ("/data/it's $5 `x`;#1\n/", "it-s--5--x---1"),
        ("/my data/model 2", "model-2"),
    ],
)
def test_the_served_name_follows_from_the_model(calls: Path, python: str, model: str, name: str) -> None:
    assert make("mar", "start", f"MODEL={model}", python).returncode == 0
    packed, started = words_of(calls)
    assert (after(packed, "--name"), after(packed, "--model")) == (name, model)
    assert after(started, "--run-dir") == f"run/{name}-8080"
    assert after(started, "--archive") == f"model-store/{name}.mar"


def test_deploy_does_everything_in_order() -> None:
    lines = [line for line in dry_run("deploy", f"PYTHON={sys.executable}", "TP=1", "PORT=9090").splitlines() if line]
    scripts = [word for line in lines for word in line.split() if word.startswith("scripts.")]
    assert scripts == ["scripts.pack.build_ops", "scripts.pack", "scripts.serve", "scripts.serve.ask"]


def test_a_complete_python_is_used_and_nothing_is_installed(calls: Path, python: str) -> None:
    output = dry_run("setup", python)
    assert "pip" not in output
    assert "venv .venv" not in output
    assert make("setup", python).returncode == 0
    assert [call[:2] for call in words_of(calls)] == [["-m", "scripts.pack.build_ops"]]


def test_every_variable_is_tried() -> None:
    assert set().union(*TARGETS.values()) == GIVEN - {"TOKENS"}  # only compared with `off`
    text = (ROOT / "Makefile").read_text()
    (given,) = re.findall(r"^GIVEN := (.*)$", text, re.MULTILINE)
    assert set(given.split()) == GIVEN | {"PYTHON", "TORCH_INDEX"}  # of `setup`: below
    recipes = [line for line in text.splitlines() if line.startswith("\t")]
    used = {
        name
        for line in recipes
        for name in re.findall(
            r"\$\(([A-Z_]+)\)", re.sub(r"\$\(if (\$\(\w+\)|\$\(filter off,\$\(TOKENS\)\))", "", line)
        )
    }
    assert used <= {"VENV", "PIP", "MAKEFILE_LIST"}  # nothing of a user's stands in a recipe


@pytest.mark.parametrize("origin", ["command line", "environment"])
@pytest.mark.parametrize("text", HOSTILE)
def test_no_value_reaches_a_shell(tmp_path: Path, calls: Path, python: str, text: str, origin: str) -> None:
    mark = tmp_path / "mark"
    value = text.format(mark=mark)
    given = dict.fromkeys(sorted(GIVEN - {"ARGS"}), value)
    words = [f"{name}={value}" for name, value in given.items()] if origin == "command line" else []
    environ = given if origin == "environment" else None
    done = make(*TARGETS, python, *words, environ=environ)
    assert done.returncode == 0, done.stderr
    assert make("-n", "help", *TARGETS, python, *words, environ=environ).returncode == 0
    assert f"MODEL={value} (smollm2" in make("help", python, *words, environ=environ).stdout
    assert not mark.exists()
    found = words_of(calls)
    assert len(found) == len(TARGETS)
    for call, (target, names) in zip(found, TARGETS.items(), strict=True):
        expected = len(names - {"ARGS"})
        assert call.count(value) == expected, target


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\n" not in text])
def test_no_python_reaches_a_shell(tmp_path: Path, calls: Path, text: str) -> None:
    """Its path may hold anything that a path can hold."""
    mark = tmp_path / "mark"
    folder = tmp_path / text.format(mark="mark").replace("/", "_")
    folder.mkdir()
    done = make("stop", "help", f"PYTHON={false_python(folder / 'python', calls)}")
    assert done.returncode == 0, done.stderr
    assert not mark.exists() and not (ROOT / "mark").exists()
    (call,) = words_of(calls)
    assert call[:3] == ["-m", "scripts.serve", "stop"]


@pytest.mark.parametrize("text", HOSTILE)
def test_an_index_reaches_the_installation_as_text(tmp_path: Path, calls: Path, text: str) -> None:
    mark, venv = tmp_path / "mark", tmp_path / "venv"
    index = text.format(mark=mark)
    venv.mkdir()
    lacking = false_python(tmp_path / "python", calls, lacks="torch")
    done = make(f"{venv}/.installed", f"VENV={venv}", f"PYTHON={lacking}", f"TORCH_INDEX={index}")
    assert done.returncode == 0 and "lacks: torch" in done.stdout, done.stderr
    assert not mark.exists()
    (call,) = words_of(calls)
    assert call == ["scripts/setup_venv.py", "--venv", str(venv), "--python", str(lacking), "--torch-index", index,
                    "--device", "auto"]  # fmt: skip


def test_args_are_several_words_and_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    (tmp_path / "told.py").write_text(code)
    args = f"--prompts 128 --out 'my file' $(touch {mark}) `touch {mark}`; touch {mark} $HOME *"
    command = [sys.executable, "-m", "scripts.common.words", args, "told", "--shape", "x y"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    words = json.loads(done.stdout)
    assert words[:6] == ["--shape", "x y", "--prompts", "128", "--out", "my file"]
    assert words[-2:] == ["$HOME", "*"] and not mark.exists()
    command[3] = "--out 'my file"
    broken = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert broken.returncode == 1 and broken.stderr.count("\n") == 1 and "ARGS=" in broken.stderr


def test_args_reach_the_benchmark_whole(tmp_path: Path, calls: Path, python: str) -> None:
    mark = tmp_path / "mark"
    args = f"--prompts 128 $(shell touch {mark}) `touch {mark}`; touch {mark} 'a b'"
    assert make("bench-gpu", python, f"ARGS={args}").returncode == 0
    (call,) = words_of(calls)
    assert call[:4] == ["-m", "scripts.common.words", args, "scripts.bench.gpu"] and not mark.exists()


def test_tokens_are_asked_for_unless_they_are_off(calls: Path, python: str) -> None:
    make("start", python)
    make("start", python, "TOKENS=off")
    assert ["--no-tokens" in call for call in words_of(calls)] == [False, True]


def test_servers_and_tests_find_no_variable_of_make_in_their_environment(tmp_path: Path) -> None:
    shown = tmp_path / "python"
    shown.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint('nothing' if sys.argv[1] == '-c' else sorted(os.environ))\n"
    )
    shown.chmod(0o755)
    done = make("stop", f"PYTHON={shown}")
    assert done.returncode == 0 and not {f"'{name}'" for name in GIVEN} & set(re.findall(r"'\w+'", done.stdout))


def test_the_ci_script_calls_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
