"""Weights of quantized kinds are known by their tensors, with no word of it in config.json; others never are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dsserve.config.handler import HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.loading.hf_model import load_outline
from dsserve.loading.quantized_files import refuse_quantized_files

A = "model.layers.0.mlp.up_proj"
FP8 = torch.zeros(64, 32).to(torch.float8_e4m3fn)
WORDS, BYTES, SCALES = torch.zeros(8, 32, dtype=torch.int32), torch.zeros(8, 32, dtype=torch.uint8), torch.ones(64)
KINDS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "FP8, scales": ({f"{A}.weight": FP8, f"{A}.weight_scale": SCALES}, rf"with scales.*{A}\.weight is F8_E4M3"),
    "FP8, no scales": ({f"{A}.weight": FP8}, rf"8-bit floats.*{A}\.weight is F8_E4M3"),
    "FP8, e5m2": ({f"{A}.weight": torch.zeros(4).to(torch.float8_e5m2)}, r"8-bit floats.*F8_E5M2"),
    "FP8, blocks": ({f"{A}.weight": FP8, f"{A}.weight_scale_inv": SCALES}, "a scale a block"),
    "scales alone": ({f"{A}.weight": torch.zeros(64, 32), f"{A}.weight_scale": SCALES}, "weight_scale is F32"),
    "INT8": ({f"{A}.weight": BYTES.to(torch.int8)}, rf"packed integers.*{A}\.weight is I8"),
    "GPTQ": ({f"{A}.g_idx": WORDS[0], f"{A}.qweight": WORDS, f"{A}.qzeros": WORDS}, rf"GPTQ or AWQ.*{A}.* is I32"),
    "compressed": ({f"{A}.weight_packed": WORDS, f"{A}.weight_scale": SCALES}, "compressed-tensors"),
    "MXFP4": ({"model.layers.0.mlp.experts.down_proj_blocks": BYTES}, r"MXFP4.*down_proj_blocks is U8"),
    "bitsandbytes, 8 bits": ({f"{A}.weight": BYTES, f"{A}.SCB": SCALES}, "bitsandbytes"),
    "bitsandbytes, 4 bits": (
        {f"{A}.weight": BYTES, f"{A}.weight.quant_state.bitsandbytes__nf4": BYTES}, rf"bitsandbytes.*{A}.* is U8"
    ),
    "HQQ": ({f"{A}.W_q": BYTES}, "HQQ"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def outline(folder: Path) -> None:
    load_outline(HandlerConfig(model_path=str(folder)), folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_quantized_kind_is_refused_with_its_format_and_its_first_tensor(folder: Path, name: str) -> None:
    outline(folder)
    tensors, words = KINDS[name]
    file = folder / "model.safetensors"
    save_file(
        {**load_file(file), **{key: value.clone() for key, value in tensors.items()}}, file, metadata={"format": "pt"}
    )
    with pytest.raises(
        LoadError, match=rf"^model-config\.yaml: handler\.model_path.*quantized \(.*{words}.*unquantized"
    ):
        outline(folder)


def test_a_file_of_torch_save_is_looked_at_too(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    outline(folder)
    torch.save({**tensors, f"{A}.weight": FP8}, folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=rf"8-bit floats.*{A}\.weight is float8_e4m3fn"):
        outline(folder)


def test_every_part_of_a_model_is_looked_at(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, folder / "a.safetensors")
    save_file({**tensors, f"{A}.weight": FP8}, folder / "b.safetensors")
    parts = dict.fromkeys(tensors, "b.safetensors") | {"model.norm.weight": "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(LoadError, match="8-bit floats"):
        outline(folder)


def test_settings_in_a_file_of_their_own_are_named(folder: Path) -> None:
    save_file({f"{A}.weight": FP8, f"{A}.weight_scale": SCALES}, folder / "model.safetensors")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(LoadError, match=r"settings in hf_quant_config\.json"):
        outline(folder)


def test_integers_that_are_no_weights_do_not_count(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    others = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "embeddings.position_ids": torch.arange(4),
        "model.layers.0.gate.e_score_correction_bias": torch.zeros(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    save_file({**load_file(file), **others}, file, metadata={"format": "pt"})
    refuse_quantized_files(tmp_path)
