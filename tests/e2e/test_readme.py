"""Every command of README and docs, run as it stands there; only ports and folders come from the environment.

`tests/unit/test_docs.py` finds commands that are neither run here nor marked with the reason why not.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.reliability import balancer
from scripts.serve import processes
from tests.conftest import ROOT
from tests.e2e.conftest import Served, free_ports
from tests.support.pages import blocks

BY_HAND_PORTS = (8080, 8081, 8082, 7070, 7071)  # TorchServe's own
OF_THE_OUTER_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "QUESTION"}


def block(page: str, first_words: str) -> str:
    """The one block of a page that begins so, and that no mark keeps from being run here."""
    (found,) = [item.text for item in blocks(ROOT / page) if item.mark is None and item.text.startswith(first_words)]
    return found


URL = "curl http://127.0.0.1:8080/predictions/smollm2"
DEPLOY, LOOK_AND_STOP = block("README.md", "make deploy"), block("README.md", "make status")
FIRST_REQUESTS, FIRST_CLIENT = block("README.md", URL), block("README.md", "from openai")
REQUESTS, OPENAI_REQUESTS = block("docs/api.md", f"{URL} "), block("docs/api.md", f"{URL}/1.0/v1")
OPENAI_CLIENT = block("docs/api.md", "import openai")
OPERATE, SHARD = block("docs/operations.md", "make health"), block("docs/loading.md", "make shard")
BY_HAND, BALANCE = block("docs/by-hand.md", "make model"), block("docs/deployment.md", "export DSSERVE_MODEL")
RUN_HERE = (
    DEPLOY, LOOK_AND_STOP, FIRST_REQUESTS, FIRST_CLIENT, REQUESTS, OPENAI_REQUESTS, OPENAI_CLIENT, OPERATE, SHARD,
    BY_HAND, BALANCE,
)  # fmt: skip


def run(commands: str, folder: Path, timeout_s: float = 240, **environ: str) -> str:
    """Runs lines in a shell that stops at the first failure; returns all they print.

    Through a file: a server that goes on running would keep a pipe open."""
    output = folder / "output"
    base = {name: value for name, value in os.environ.items() if name not in OF_THE_OUTER_MAKE}
    with output.open("w") as file:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=ROOT, env=base | environ, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
        )  # fmt: skip
    text = output.read_text(encoding="utf-8")
    assert done.returncode == 0, text
    return text


def test_deploy_ask_requests_status_and_stop(tmp_path: Path) -> None:
    port, run_dir = str(free_ports().inference), tmp_path / "run"
    environ = {"PORT": port, "RUN_DIR": str(run_dir)}
    try:
        deployed = run(DEPLOY, tmp_path, **environ)
        assert "2 ranks on cpu" in deployed
        assert "Tokyo" in deployed
        again = re.findall(r"^  (curl .*)$", deployed, flags=re.MULTILINE)
        assert len(again) == 2
        assert "Tokyo" in run(again[0], tmp_path)
        asked = run(FIRST_REQUESTS.replace(":8080/", f":{port}/"), tmp_path)
        assert "Paris" in asked and "Tokyo" in asked
        replies = run(REQUESTS.replace(":8080/", f":{port}/"), tmp_path)
        assert '"completion_tokens":20' in replies
        assert "data: [DONE]" in replies
        replies = run(OPENAI_REQUESTS.replace(":8080/", f":{port}/"), tmp_path)
        assert '"owned_by":"dsserve"' in replies and '"count":2' in replies and '"index":3' in replies
        (tmp_path / "client.py").write_text((FIRST_CLIENT + OPENAI_CLIENT).replace(":8080/", f":{port}/"))
        printed = run(f"{sys.executable} {tmp_path / 'client.py'}", tmp_path)
        assert "Tokyo" in printed[: printed.index("{")]
        assert set(json.loads(printed[printed.index("{") :])) == {"name", "age"}
        operated = run(OPERATE, tmp_path, **environ)
        assert "ready: smollm2 answers" in operated and "done after" in operated
        looked = run(LOOK_AND_STOP, tmp_path, **environ)
        assert "READY" in looked and "stopped" in looked
        for rank, rows in ((0, 384), (1, 192)):
            assert f"rank {rank}: model.layers.0.self_attn.q_proj [{rows}, 576]" in looked
            assert f"rank {rank}: model.layers.0.self_attn.o_proj [576, {rows}]" in looked
            assert f"rank {rank}: model.layers.0.mlp.down_proj [576, 768]" in looked
        assert "all-reduces in a decode step: 61 for 30 layers" in looked
        assert processes.find_marked(run_dir) == []
    finally:
        run("make stop", tmp_path, **environ)


def test_the_balancers_commands(fp32: Served, tmp_path: Path) -> None:
    try:
        path = f"{Path(balancer.find_haproxy()).parent}:{os.environ['PATH']}"
    except balancer.BalancerError as error:
        pytest.skip(str(error))
    port = free_ports().inference
    commands = (
        BALANCE.replace(":8080", f":{fp32.record.port}").replace(":8000", f":{port}").replace("run/", f"{tmp_path}/")
    )
    sockets = {"BIND": f"127.0.0.1:{port}", "STATS": f"127.0.0.1:{port + 1}", "ADMIN": str(tmp_path / "admin.sock")}
    environ = {f"{balancer.OURS}{name}": value for name, value in sockets.items()}
    replies = run(commands, tmp_path, 60, PATH=path, **environ)
    assert "Configuration file is valid" in replies and "Tokyo" in replies and '"object":"chat.completion"' in replies


@pytest.mark.long
def test_the_shards_command(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "large"
    model.mkdir()
    for item in smollm2.iterdir():
        (model / item.name).symlink_to(item)
    printed = run(SHARD.replace("/models/large", str(model)), tmp_path)
    folder = model / "shards" / "tp2-bfloat16"
    assert printed.splitlines()[-1] == str(folder) and "rank 1: wrote file 1" in printed
    parts = ["manifest.json", "rank-0-001.safetensors", "rank-1-001.safetensors", "reference.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == parts


@pytest.mark.long
@pytest.mark.timeout(600)
def test_by_hand(tmp_path: Path) -> None:
    """The configuration's bf16 is slow on a CPU that has no instructions for it: the load alone may take minutes."""
    for port in BY_HAND_PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port}, which the commands name, belongs to another program here")
    environ = {name: str(tmp_path) for name in ("TEMP", "TMPDIR", "LOG_LOCATION", "METRICS_LOCATION")}
    try:
        output = run(BY_HAND, tmp_path, 480, **environ)
        assert "Paris" in output
    finally:
        stop = 'export PATH="$PWD/.venv/bin:$PATH"; torchserve --stop'
        subprocess.run(["bash", "-c", stop], cwd=ROOT, env=os.environ | environ, capture_output=True, check=False)
