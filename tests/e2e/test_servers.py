"""Servers as operators meet them: two on one machine, loads that cannot work, and an end without leftovers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from scripts.model.shard import ShardError, shard
from scripts.pack import archive as packaging
from scripts.pack.archive import Choice, package
from scripts.serve import processes, server
from tests.e2e.conftest import Served, serve


@pytest.mark.long
def test_a_second_server_beside_the_first_meets_nothing_of_it(fp32: Served, smollm2: Path, tmp_path: Path) -> None:
    """It serves from what `make shard` wrote, in a folder without the model's own weights."""
    model, choice = tmp_path / "model", Choice(tp="2", device="cpu", dtype="fp32")
    model.mkdir()
    for item in smollm2.iterdir():
        (model / item.name).symlink_to(item)
    assert shard("second", str(model), choice) == model / "shards" / "tp2-float32"
    for item in model.glob("*.safetensors"):
        item.unlink()
    second = serve(tmp_path / "run", "second", package("second", str(model), choice, model_store=tmp_path / "store"))
    body = {"prompt": "The capital of France is", "max_new_tokens": 6}
    try:
        assert second.text(body) == fp32.text(body)
        for rank in (0, 1):
            assert f"rank {rank}: read file 1 of 1" in second.worker_log()
        ranks = [
            process for process in processes.find_marked(second.run.path) if "worker" in " ".join(process.cmdline())
        ]
        assert len(ranks) >= 2
    finally:
        assert server.stop(second.run) == 0
    assert not [process for process in ranks if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert fp32.text(body).startswith(" Paris") or "Paris" in fp32.text(body)


def test_nothing_is_left_in_shared_memory(fp32: Served) -> None:
    ranks = [process.pid for process in processes.find_marked(fp32.run.path)]
    assert ranks
    left = [name for name in os.listdir("/dev/shm") if name.startswith("deepspeed_allreduce_buffer")]
    assert left == []


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("handler", {"model_path": "/no/such/model"}, ["handler.model_path", "/no/such/model"]),
        pytest.param("handler", {"model_path": "."}, ["config.json"], marks=pytest.mark.long),  # an empty archive
        pytest.param("handler", {"max_length": 50}, ["handler.max_length", "max_new_tokens"], marks=pytest.mark.long),
        pytest.param(
            "deepspeed", {"config": "missing.json"}, ["missing.json", "--extra-files"], marks=pytest.mark.long
        ),
        ("deepspeed", {"tensor_parallel": {"tp_size": 4}}, ["tp_size", "nproc-per-node", "deviceIds"]),
        pytest.param("deepspeed", {"dtype": "fp8", "config": "auto"}, ["dtype", "fp8"], marks=pytest.mark.long),
    ],
)
def test_a_load_that_cannot_work_is_told_and_never_hangs(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, changes: dict, words: list[str]
) -> None:
    """What `make deploy` prints is this error; the worker's log holds it too."""

    def render_with_fault(*args, **kwargs):
        model_config, ds_config = render(*args, **kwargs)
        model_config.setdefault(section, {}).update(changes)
        if model_config["deepspeed"].get("config") == "auto":
            del model_config["deepspeed"]["config"]
        return model_config, ds_config

    render = packaging.render
    monkeypatch.setattr(packaging, "render", render_with_fault)
    archive = package(
        "faulty", str(smollm2), Choice(tp="2", device="cpu", dtype="fp32"), model_store=tmp_path / "store"
    )
    with pytest.raises(server.ServerError) as raised:
        serve(tmp_path / "run", "faulty", archive)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert processes.find_marked(tmp_path / "run") == []


def test_a_model_that_cannot_be_sharded_is_told_and_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    for item in smollm2.iterdir():
        if item.suffix != ".safetensors":
            (tmp_path / item.name).symlink_to(item)
    (tmp_path / "model.safetensors").write_bytes((smollm2 / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"model\.safetensors is not a whole safetensors file"):
        shard("smollm2", str(tmp_path), Choice(tp="2", dtype="fp32"))
    assert not (tmp_path / "shards").exists()
