"""Weights, model folders and archives are untrusted: nothing that they hold runs unless `trust_remote_code` says so."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from dsserve.config.handler import HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.loading.hf_model import load_model
from dsserve.parallel.rank import RankInfo, prepare_environment


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_model_folder_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError):
        load_model(HandlerConfig(model_path=str(tmp_path)), tmp_path)
    assert not trace.exists()


def test_code_in_weights_does_not_run(smollm2: Path, tmp_path: Path) -> None:
    """A .bin file is a pickle: transformers refuses what is no tensor."""
    for item in smollm2.iterdir():
        if item.suffix != ".safetensors":
            (tmp_path / item.name).symlink_to(item)
    trace = tmp_path / "it-ran"
    torch.save({"model.embed_tokens.weight": Bomb(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError):
        load_model(HandlerConfig(model_path=str(tmp_path)), tmp_path)
    assert not trace.exists()


def test_deepspeeds_own_loading_is_held_to_tensors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads `deepspeed.checkpoint` with `weights_only=False`; the environment overrules it."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    prepare_environment(torch.device("cpu"), RankInfo(0, 0, 1, 1), torch.get_num_threads())
    trace = tmp_path / "it-ran"
    torch.save({"x": Bomb(trace)}, tmp_path / "x.bin")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.bin", weights_only=False)
    assert not trace.exists()
