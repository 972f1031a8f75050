"""The list of weight files under `deepspeed.checkpoint`, and models made on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.core.errors import LoadError
from dsserve.loading import checkpoint
from dsserve.modeling import self_check


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")


def test_one_file_and_nothing_foreign(tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model.bin", "training_args.bin", "optimizer.bin")
    assert checkpoint.find_bin_files(tmp_path) == [tmp_path / "pytorch_model.bin"]


def test_an_index_names_the_shards_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "a.bin", "b.bin", "training_args.bin")
    weight_map = {"x": "b.bin", "y": "a.bin", "z": "b.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert [path.name for path in checkpoint.find_bin_files(tmp_path)] == ["a.bin", "b.bin"]


def test_missing_weights_are_named_and_safetensors_explained(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin.*only \.bin"):
        checkpoint.find_bin_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(LoadError, match="index"):
        checkpoint.find_bin_files(tmp_path)


def test_the_list_is_deepspeeds_format_and_written_whole(tmp_path: Path) -> None:
    destination = tmp_path / "checkpoints.json"
    checkpoint.write_checkpoint_list([tmp_path / "a.bin"], destination)
    content = json.loads(destination.read_text())
    assert content == {"type": "ds_model", "checkpoints": [str(tmp_path / "a.bin")], "version": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints.json"]


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )  # fmt: skip


def test_buffers_that_no_checkpoint_holds_get_their_values() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    checkpoint.restore_buffers(model)
    expected = LlamaForCausalLM(tiny_config()).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)


def test_what_is_left_without_values_is_named() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    with pytest.raises(LoadError, match=r"embed_tokens\.weight"):
        self_check.check_nothing_on_meta(model)
