"""Random models of every architecture that DeepSpeed's kernels stand in for, tiny for a CPU, of real shape for a GPU.

Real shapes have few layers; heads of 64, 80, 128 and 256 values; vocabularies that are no multiple of 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ENCODERS = ("bert", "distilbert")


@dataclass(frozen=True)
class Size:
    """What a test asks of the kernels: batches of `rows`, `tokens` of prompt + output, a local window."""

    rows: int
    tokens: int
    window: int


# Deviation of a real shape's weights, times the root of what each reads: 0.018 at 2048, near what transformers starts
# from. With embeddings of deviation 1 a layer changes the residual stream instead of replacing it. Without both, as
# with 0.05 everywhere, attention is nearly one-hot at wide models and each layer doubles an error: transformers' own
# logits of such a Llama are off by 5e-2 in fp16 (1e-3 with these), and say nothing about the kernels.
_REAL_SPREAD = 0.8

SIZES = {"tiny": Size(4, 48, 8), "real": Size(8, 512, 256)}


def _dims(size: str, heads: int, head: int, layers: int = 4) -> tuple[int, int, int]:
    if size == "tiny":  # three ranks divide nine heads, the other numbers of ranks eight
        return (9 * 16, 9, 3) if heads == 9 else (8 * (24 if head == 80 else 16), 8, 3)
    return heads * head, heads, layers


def make_config(name: str, size: str) -> Any:
    """The config of architecture `name`: a model type, or one with a variant behind a dash."""
    kind, _, variant = name.partition("-")
    window, positions = SIZES[size].window, SIZES[size].tokens + 8  # the workspace ends first
    vocab = 99 if size == "tiny" else 50265
    # The kernels' GELU is the tanh form; where exactness is to be shown the models have it too.
    gelu = "gelu_new" if size == "tiny" else "gelu"
    common = {
        "vocab_size": vocab,
        "tie_word_embeddings": kind not in ("gptj", "llama", "bloom"),
    }
    if kind == "gpt2":
        hidden, heads, layers = _dims(size, 12, 64)
        shape = {"n_embd": hidden, "n_head": heads, "n_layer": layers, "n_positions": positions}
    elif kind == "opt":
        hidden, heads, layers = _dims(size, *{"": (12, 64), "80": (32, 80), "post": (16, 64), "9": (9, 64)}[variant])
        post = {"do_layer_norm_before": False, "word_embed_proj_dim": hidden // 2} if variant == "post" else {}
        shape = {
            "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "ffn_dim": 4 * hidden,
            "max_position_embeddings": positions, "word_embed_proj_dim": hidden, **post,
        }  # fmt: skip
    elif kind == "bloom":
        hidden, heads, layers = _dims(size, 16, 64)
        shape = {"hidden_size": hidden, "n_head": heads, "n_layer": layers}
    elif kind == "gptj":
        hidden, heads, layers = _dims(size, 8, 256, 2)
        shape = {"n_embd": hidden, "n_head": heads, "n_layer": layers, "n_positions": positions}
        shape |= {"rotary_dim": 4 if size == "tiny" else 64}
    elif kind == "gpt_neo":
        hidden, heads, layers = _dims(size, 16, 128)
        shape = {
            "hidden_size": hidden, "num_heads": heads, "num_layers": layers, "window_size": window,
            "max_position_embeddings": positions, "attention_types": [[["global", "local"], layers // 2]],
        }  # fmt: skip
        if layers % 2:
            shape["attention_types"] = [[["global", "local", "global"], 1]]
    elif kind == "gpt_neox":
        hidden, heads, layers = _dims(size, *{"": (12, 64), "80": (32, 80)}[variant])
        shape = {
            "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers,
            "intermediate_size": 4 * hidden, "max_position_embeddings": positions, "hidden_act": gelu,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        }  # fmt: skip
    elif kind == "llama":
        hidden, heads, layers = _dims(size, *{"": (16, 128), "gqa": (32, 64), "80": (24, 80)}[variant])
        wide = 4 if variant == "gqa" or size == "tiny" else {"80": 8 / 3}.get(variant, 2.6875)
        shape = {
            "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": heads // 4 if variant == "gqa" else heads, "intermediate_size": int(wide * hidden),
            "max_position_embeddings": positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0 if variant == "gqa" else 10000.0},
        }  # fmt: skip
    elif kind == "bert":
        hidden, heads, layers = _dims(size, 12, 64)
        shape = {
            "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers,
            "intermediate_size": 4 * hidden, "max_position_embeddings": positions, "hidden_act": gelu,
        }  # fmt: skip
    elif kind == "distilbert":
        hidden, heads, layers = _dims(size, 12, 64)
        shape = {"dim": hidden, "n_heads": heads, "n_layers": layers, "hidden_dim": 4 * hidden}
        shape |= {"max_position_embeddings": positions, "activation": gelu}
    else:
        raise ValueError(name)
    std = 0.05 if size == "tiny" else _REAL_SPREAD / hidden**0.5
    return AutoConfig.for_model(kind, initializer_range=std, init_std=std, **{**common, **shape})


def make_model(name: str, size: str, dtype: torch.dtype, device: str) -> Any:
    """A random model in fp32 on `device` whose weights are exact in `dtype`; biases and norms are no zeros and ones."""
    torch.manual_seed(0)
    with torch.device(device):
        maker = AutoModel if name in ENCODERS else AutoModelForCausalLM
        model = maker.from_config(make_config(name, size)).eval()
    if size == "real":
        _temper(name, model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype))
    if name not in ENCODERS:
        model.generation_config.eos_token_id = None
    return model


def _temper(name: str, model: Any) -> None:
    """Makes random weights as good-natured as trained ones, see `_REAL_SPREAD`."""
    embeddings = model.get_input_embeddings().weight.data
    embeddings /= embeddings.std()
    if name == "gpt_neo":  # does not scale its attention: trained queries are small instead
        for layer in model.transformer.h:
            attention = layer.attn.attention
            attention.q_proj.weight.data /= attention.head_dim**0.5
