"""Weight files that are cut, damaged, doubled or foreign: each has a message that names the file, or does not count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsserve.config.handler import HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.loading.hf_model import load_outline, load_weights, locate_model
from dsserve.loading.weight_files import find_weight_files
from dsserve.modeling.self_check import check_finite

SINGLE, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
A_KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small model, saved as a single file, in parts, and as torch.save does."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    )
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("single", "parts", "bin")}
    model.save_pretrained(folders["single"])
    model.save_pretrained(folders["parts"], max_shard_size="20KB")
    model.config.save_pretrained(folders["bin"])
    torch.save(model.state_dict(), folders["bin"] / BIN)
    return folders


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(saved[kind], tmp_path / kind))


def load(folder: Path) -> torch.nn.Module:
    return load_weights(HandlerConfig(model_path=str(folder)), folder)


@pytest.mark.parametrize("kind", ["single", "parts", "bin"])
def test_every_format_gives_the_same_weights(saved: dict[str, Path], kind: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(saved["single"]).state_dict()
    found = load(saved[kind]).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def cut(file: Path, share: float = 0.7) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def part(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def double_a_tensor(folder: Path) -> None:
    name, tensor = next(iter(load_file(part(folder, 0)).items()))
    edit(part(folder, 1), lambda tensors: tensors.update({name: tensor}))


def lose_a_tensor(folder: Path) -> None:
    edit(part(folder, 1), lambda tensors: tensors.popitem())


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(json.dumps(content))


CORRUPTIONS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "data cut short": ("single", lambda f: cut(f / SINGLE), [SINGLE, "not a whole safetensors file"]),
    "header cut short": ("single", lambda f: cut(f / SINGLE, 0.001), [SINGLE, "not a whole safetensors file"]),
    "empty file": ("single", lambda f: (f / SINGLE).write_bytes(b""), [SINGLE, "not a whole safetensors file"]),
    "an HTML page": ("single", lambda f: (f / SINGLE).write_text("<html>404</html>"), [SINGLE, "not a whole"]),
    "a tensor missing": (
        "single", lambda f: edit(f / SINGLE, lambda tensors: tensors.pop(A_KEY)), ["lack 1 tensor", A_KEY],
    ),
    "a tensor of another shape": (
        "single", lambda f: edit(f / SINGLE, lambda t: t.update({A_KEY: torch.zeros(3, 3)})),
        [A_KEY, "[3, 3] and not [64, 32]"],
    ),
    "a part missing": ("parts", lambda f: part(f, 1).unlink(), ["model-00002-of", "not found"]),
    "a part cut short": ("parts", lambda f: cut(part(f, 1)), ["model-00002-of", "not a whole safetensors file"]),
    "a tensor in two parts": ("parts", double_a_tensor, ["model-00001-of", "model-00002-of", "both hold"]),
    "a part without its tensor": ("parts", lose_a_tensor, ["model-00002-of", "lacks", "index says"]),
    "an index that is no JSON": ("parts", lambda f: (f / INDEX).write_text("{"), [INDEX, "not a weight index"]),
    "an index without a map": ("parts", lambda f: write_index(f, {}), [INDEX, "not a weight index"]),
    "an index of another folder": (
        "parts", lambda f: write_index(f, {"weight_map": {"x": "../model.safetensors"}}), [INDEX, "its own folder"],
    ),
    "a .bin cut short": ("bin", lambda f: cut(f / BIN), [BIN, "its end is missing"]),
    "a .bin that is none": ("bin", lambda f: (f / BIN).write_bytes(b"weights"), [BIN, "no file of torch.save"]),
    "training_args.bin alone": (
        "bin", lambda f: (f / BIN).rename(f / "training_args.bin"), ["no weights", "training_args.bin", "not served"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_broken_is_named(copied: Callable[[str], Path], name: str) -> None:
    kind, corrupt, words = CORRUPTIONS[name]
    folder = copied(kind)
    load(folder)
    corrupt(folder)
    with pytest.raises(LoadError) as error:
        load(folder)
    assert str(error.value).startswith("model-config.yaml: handler.model_path") or "weight files" in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_files_that_are_no_weights_do_not_count(copied: Callable[[str], Path]) -> None:
    folder = copied("single")
    (folder / "training_args.bin").write_bytes(b"no weights")
    (folder / "optimizer.safetensors").write_bytes(b"no weights")
    assert [file.name for file in find_weight_files(folder).files] == [SINGLE]
    load(folder)


def test_tensors_that_are_not_the_models_are_named_in_the_log(
    copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("single")
    edit(folder / SINGLE, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    load(folder)
    assert "1 tensor(s) in the files are no part of the model: ['extra.weight']" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(saved: dict[str, Path], value: float) -> None:
    model = load(saved["single"])
    check_finite(model)
    with torch.no_grad():
        model.get_parameter(A_KEY)[-1, 3] = value
    with pytest.raises(LoadError, match=r"1 tensor.*not finite in float32.*up_proj"):
        check_finite(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_weights_that_are_quantized_already_are_refused_by_name(copied: Callable[[str], Path], method: str) -> None:
    folder = copied("single")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(LoadError, match=f"quantized with {method}.*unquantized"):
        load_outline(HandlerConfig(model_path=str(folder)), folder)


def test_a_hub_id_is_found_in_the_hubs_cache_without_a_network(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--org--name"
    shutil.copytree(saved["single"], repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = locate_model(HandlerConfig(model_path="org/name"), tmp_path)
    assert folder == repository / "snapshots" / "abc123"
    load(folder)
    with pytest.raises(LoadError, match=r"handler\.model_path: org/other could not be loaded"):
        locate_model(HandlerConfig(model_path="org/other"), tmp_path)
    with pytest.raises(LoadError, match=r"org/name could not be loaded"):
        locate_model(HandlerConfig(model_path="org/name", revision="v2"), tmp_path)
