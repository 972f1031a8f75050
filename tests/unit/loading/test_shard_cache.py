"""A shard cache is used when it is whole and fits; else it is named and left, or the load is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.core.errors import LoadError
from dsserve.loading import shard_cache
from dsserve.loading.shard_cache import find_shards, write_shards
from dsserve.loading.shard_manifest import Manifest
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.rank import RankInfo

ALONE = RankInfo(0, 0, 1, 1)
CPU = torch.device("cpu")
PART = "rank-0-001.safetensors"


def make(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
            tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Manifest]:
    """The model's folder, whose cache is complete, and what is wanted of it."""
    model = make()
    model.save_pretrained(tmp_path)
    manifest = Manifest.describe(model, tmp_path, 1, torch.float32)
    check = SelfCheck.capture(model, torch.float32)
    folder = write_shards(model, check, manifest, tmp_path / "shards", ALONE)
    assert folder == tmp_path / "shards" / "tp1-float32"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", PART, "reference.safetensors"]
    return tmp_path, manifest


def fill(folder: Path, manifest: Manifest) -> Any:
    shards = find_shards(manifest, folder / "shards", ALONE)
    assert shards is not None
    with torch.device("meta"):
        outline = make()
    outline.to_empty(device=CPU)
    shards.fill(outline, 0, CPU)
    return outline


def test_a_model_comes_back_with_its_ties_and_buffers(written: tuple[Path, Manifest]) -> None:
    found, expected = fill(*written), make()
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert torch.equal(found.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    shards = find_shards(written[1], written[0] / "shards", ALONE)
    assert shards is not None and shards.reference is not None
    assert shards.reference.verify(found(shards.reference.token_ids[None]).logits[0], "the cache") < 1e-6


def test_large_shards_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "_FILE_BYTES", 10_000)
    model = make(tied=False)
    model.save_pretrained(tmp_path)
    manifest = Manifest.describe(model, tmp_path, 1, torch.float32)
    folder = write_shards(model, None, manifest, tmp_path / "shards", ALONE)
    assert len(list(folder.glob("rank-0-*.safetensors"))) > 3
    shards = find_shards(manifest, tmp_path / "shards", ALONE)
    assert shards is not None and shards.reference is None
    other = make(tied=False)
    torch.nn.init.zeros_(other.lm_head.weight)
    shards.fill(other, 0, CPU)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_a_folder_that_holds_nothing_but_the_cache_is_enough(written: tuple[Path, Manifest]) -> None:
    folder, _ = written
    (folder / "model.safetensors").unlink()
    fill(folder, Manifest.describe(make(), folder, 1, torch.float32))


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def repair_a_norm(folder: Path) -> None:
    """In place, far from the beginning of the file, its size and modification time kept."""
    file = folder / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.norm.weight"] *= 1.25
    save_file(tensors, folder / "repaired", {"format": "pt"})
    with file.open("r+b") as opened:
        opened.write((folder / "repaired").read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))


def change_manifest(folder: Path, **changes: object) -> None:
    file = folder / "shards" / "tp1-float32" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_part(folder: Path) -> None:
    file = folder / "shards" / "tp1-float32" / PART
    file.write_bytes(file.read_bytes()[:-1])


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "other weights of the same shapes": (change_weights, "another model.safetensors (source)"),
    "a norm repaired in place": (repair_a_norm, "another model.safetensors (source)"),
    "another config.json": (change_config, "another config"),
    "another DeepSpeed": (lambda f: change_manifest(f, libraries={"deepspeed": "0.1"}), "another libraries"),
    "another format": (lambda f: change_manifest(f, format=1), "not a manifest of this version"),
    "a manifest cut short": (
        lambda f: (f / "shards" / "tp1-float32" / "manifest.json").write_text("{"), "not a manifest",
    ),
    "a part cut short": (cut_part, "missing or cut short"),
    "a part missing": (lambda f: (f / "shards" / "tp1-float32" / PART).unlink(), "missing or cut short"),
    "no manifest: interrupted writing": (
        lambda f: (f / "shards" / "tp1-float32" / "manifest.json").unlink(), "is not there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_cache_that_does_not_fit_is_named_and_left(
    written: tuple[Path, Manifest], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = written
    spoil, reason = UNFIT[name]
    spoil(folder)
    wanted = Manifest.describe(make(), folder, 1, torch.float32)
    with caplog.at_level("INFO"):
        assert find_shards(wanted, folder / "shards", ALONE) is None
    assert reason in caplog.text and "make shard" in caplog.text


def test_weights_that_are_copied_elsewhere_are_the_same(written: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, _ = written
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)
    fill(folder, Manifest.describe(make(), folder, 1, torch.float32))


def test_another_size_or_dtype_is_another_folder(written: tuple[Path, Manifest]) -> None:
    folder, _ = written
    for tp_size, dtype in ((2, torch.float32), (1, torch.bfloat16)):
        assert find_shards(Manifest.describe(make(), folder, tp_size, dtype), folder / "shards", ALONE) is None


def test_a_damaged_byte_refuses_the_load(written: tuple[Path, Manifest]) -> None:
    file = written[0] / "shards" / "tp1-float32" / PART
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(LoadError, match=r"damaged rank-0-001\.safetensors.*make shard"):
        fill(*written)


def test_other_tensors_refuse_the_load(written: tuple[Path, Manifest]) -> None:
    shards = find_shards(written[1], written[0] / "shards", ALONE)
    assert shards is not None
    model = make()
    model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(LoadError, match=r"other tensors \(none for extra"):
        shards.fill(model, 0, CPU)


def test_writing_that_is_interrupted_leaves_the_old_cache(
    written: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = written

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shard_cache, "save_file", fail)
    with pytest.raises(LoadError, match=r"shards cannot be written \(No space left.*handler\.shard_cache"):
        write_shards(make(), None, manifest, folder / "shards", ALONE)
    fill(folder, manifest)
    monkeypatch.undo()
    shutil.rmtree(folder / "shards" / "tp1-float32")
    assert find_shards(manifest, folder / "shards", ALONE) is None
    write_shards(make(), None, manifest, folder / "shards", ALONE)
    fill(folder, manifest)
    assert [path.name for path in (folder / "shards").iterdir()] == ["tp1-float32"]


def test_a_tensor_that_is_neither_parameter_nor_buffer_is_refused(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    model.model.secret = torch.ones(1)
    manifest = Manifest.describe(model, tmp_path, 1, torch.float32)
    with pytest.raises(LoadError, match=r"model\.secret is neither parameter nor buffer"):
        write_shards(model, None, manifest, tmp_path / "shards", ALONE)
