"""The archive holds the handlers and one configuration in which each choice stands once."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsserve.config.handler import AUTO_RUNNING
from dsserve.config.torchserve import ENOUGH_QUEUE
from scripts.common.machine import MachineError
from scripts.common.paths import ROOT
from scripts.pack import archive as packaging
from scripts.pack.archive import (
    BATCH_SIZE,
    CONFIGS,
    JOB_QUEUE_SIZE,
    ROOM_KEYS,
    Choice,
    PackageError,
    package,
    render,
    room,
)
from scripts.serve.server import ServerError, read_archive

SMOLLM2 = ROOT / "configs" / "smollm2"


def test_the_choice_is_written_once() -> None:
    model_config, ds_config = render(SMOLLM2, "/models/x", Choice(tp="3", device="cpu", dtype="fp32"))
    assert model_config["torchrun"]["nproc-per-node"] == 3
    assert model_config["deviceType"] == "cpu"
    assert model_config["handler"]["model_path"] == "/models/x"
    assert ds_config["dtype"] == "fp32"
    assert "tensor_parallel" not in ds_config
    assert "deviceIds" not in model_config
    assert "dtype" not in model_config["deepspeed"]


def test_all_other_settings_stay_as_committed() -> None:
    committed = yaml.safe_load((SMOLLM2 / "model-config.yaml").read_text())
    model_config, _ = render(SMOLLM2, committed["handler"]["model_path"], Choice(device="cpu"))
    assert model_config == committed


def test_device_ids_are_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model-config.yaml").write_text("torchrun: {nproc-per-node: 2}\ndeviceIds: [0, 1]\n")
    (tmp_path / "ds-config.json").write_text("{}")
    assert "deviceIds" not in render(tmp_path, "x", Choice(device="cpu"))[0]
    monkeypatch.setattr("scripts.common.machine.count_gpus", lambda: 2)
    assert render(tmp_path, "x", Choice(device="gpu"))[0]["deviceIds"] == [0, 1]


def test_a_configuration_without_tp_size_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model-config.yaml").write_text("minWorkers: 1\n")
    (tmp_path / "ds-config.json").write_text("{}")
    with pytest.raises(PackageError, match=r"torchrun\.nproc-per-node is missing"):
        render(tmp_path, "x", Choice(device="cpu"))


def test_the_archive(tmp_path: Path) -> None:
    path = package("some-model", "/models/x", Choice(tp="2", device="cpu", dtype="fp32"), "2.1", tmp_path / "store")
    assert path == tmp_path / "store" / "some-model.mar"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
        assert archive.read("deepspeed_handler.py") == (ROOT / "handlers" / "deepspeed_handler.py").read_bytes()
        assert json.loads(archive.read("ds-config.json"))["dtype"] == "fp32"
    handlers = ROOT / "handlers"
    sources = {str(file.relative_to(handlers)) for kind in ("*.py", "*.cpp") for file in handlers.rglob(kind)}
    assert names == sources | {"ds-config.json", "model-config.yaml", "MAR-INF/MANIFEST.json"}
    assert (manifest["modelName"], manifest["modelVersion"]) == ("some-model", "2.1")
    assert manifest["handler"] == "deepspeed_handler.py"
    assert read_archive(path)["handler"]["model_path"] == "/models/x"


def test_packing_again_replaces_the_archive(tmp_path: Path) -> None:
    package("m", "/models/x", Choice(tp="2", device="cpu"), model_store=tmp_path)
    path = package("m", "/models/x", Choice(tp="1", device="cpu"), model_store=tmp_path)
    assert read_archive(path)["torchrun"]["nproc-per-node"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-f", "a b", "a;b", "ü"])
def test_a_name_unfit_for_urls_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"NAME=.* is not fit for a URL"):
        package(name, "x", Choice(), model_store=tmp_path)
    with pytest.raises(PackageError, match=r"VERSION=.* is not fit for a URL"):
        package("m", "x", Choice(), version=name, model_store=tmp_path)


def test_an_impossible_choice_packs_nothing(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="TP=many"):
        package("m", "x", Choice(tp="many", device="cpu"), model_store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("config", [{"num_attention_heads": 9}, {"text_config": {"n_head": 9}}])
def test_more_ranks_than_heads_are_refused_before_torchrun_starts_them(tmp_path: Path, config: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="TP=3000: the model has 9 attention heads"):
        package("m", str(tmp_path), Choice(tp="3000", device="cpu"), model_store=tmp_path / "store")
    assert package("m", str(tmp_path), Choice(tp="9", device="cpu"), model_store=tmp_path / "store").is_file()


def test_the_archivers_own_error_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "ENTRY", "no_such_file.py")
    with pytest.raises(PackageError, match="no_such_file"):
        package("m", "x", Choice(device="cpu"), model_store=tmp_path)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="make mar"):
        read_archive(tmp_path / "none.mar")
    (tmp_path / "bad.mar").write_bytes(b"not a zip file")
    with pytest.raises(ServerError, match="no archive"):
        read_archive(tmp_path / "bad.mar")


@pytest.mark.parametrize(
    ("handler", "rows"),
    [
        ({}, 1024),
        ({"max_running": "auto", "max_waiting": 8}, 1024),
        ({"max_running": 16, "max_waiting": 2000}, 16 + 2000 + 64),
        ({"max_running": 1024, "max_waiting": 0}, 1024 + 64),
        ({"max_running": "many"}, 1024),
    ],
)
def test_each_request_of_a_burst_reaches_the_handler(tmp_path: Path, handler: dict[str, Any], rows: int) -> None:
    """Rows of a call follow from what the handler holds, also where the template states others."""
    archive = package("burst", "/models/x", Choice("1", "cpu", "fp32"), model_store=tmp_path, handler=handler)
    config = read_archive(archive)
    assert (config["batchSize"], config["jobQueueSize"]) == (rows, ENOUGH_QUEUE)


def test_a_folder_of_its_own_states_its_sizes_or_has_them_derived(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "smollm2").symlink_to(CONFIGS / "smollm2")
    (own / "ds-config.json").write_text("{}")
    (own / "model-config.yaml").write_text("template: smollm2\nhandler: {max_running: 100}\n")
    assert render(own, "/x", Choice("1", "cpu"))[0]["batchSize"] == BATCH_SIZE
    (own / "model-config.yaml").write_text("template: smollm2\nbatchSize: 81\njobQueueSize: 7\n")
    assert [render(own, "/x", Choice("1", "cpu"))[0][key] for key in ROOM_KEYS] == [81, 7]


def test_the_scripts_and_the_handler_mean_the_same() -> None:
    """Also where TorchServe is started by hand, with the template as it is."""
    stated = yaml.safe_load((CONFIGS / "smollm2" / "model-config.yaml").read_text())
    assert stated["batchSize"] == BATCH_SIZE > max(AUTO_RUNNING.values())
    assert JOB_QUEUE_SIZE == ENOUGH_QUEUE
    assert room(stated["handler"]) == {key: stated[key] for key in ROOM_KEYS}


def test_startup_timeout_follows_from_the_models_size(tmp_path: Path) -> None:
    model = tmp_path / "large"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(140 * 10**9)
    assert packaging.startup_timeout_s(model) == 300 + 2800
    assert packaging.startup_timeout_s(tmp_path / "org" / "name") == 3600
    archive = package("large", str(model), Choice(tp="2", device="cpu"), model_store=tmp_path)
    assert read_archive(archive)["startupTimeout"] == 3100
    demo = package("smollm2", str(model), Choice(tp="2", device="cpu"), model_store=tmp_path)
    assert read_archive(demo)["startupTimeout"] == 600
