"""Perplexity of a model with its weights as they are and quantized, on a fixed English text.

The text is Python's own language reference, which every interpreter carries (`pydoc_data.topics`). One process, the
layers that a rank alone would run (`dsserve.modeling.quantization`). Prints a table and then one JSON line; measures no
speed.
"""

from __future__ import annotations

import json
import math
import platform
from typing import Any

import torch
import torch.nn.functional as F
import typer

from scripts.bench import deepspeed_weights
from scripts.common.console import fail, say
from scripts.common.paths import DEMO_MODEL
from scripts.model.prepare import ModelError, prepare

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOPICS = (
    "assignment",
    "class",
    "compound",
    "dynamic-features",
    "exceptions",
    "execmodel",
    "import",
    "naming",
    "numbers",
)


def reference_text() -> str:
    """The language reference on `TOPICS`, some 10,000 words."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in TOPICS if name in topics)


def load(path: str, mode: str, dtype: str, device: torch.device, shuffle: bool = False) -> Any:
    """The model in `dtype`, its layers quantized where `mode` is none of the dtypes. Raises LoadError.

    A mode that begins with `deepspeed-` is DeepSpeed's own quantization (`deepspeed_weights`).
    """
    from transformers import AutoModelForCausalLM

    from dsserve.modeling.quantization import check_device, quantize_layers

    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[mode if mode in DTYPES else dtype])
    model = model.eval().to(device)
    if shuffle:
        shuffle_features(model)
    if mode.startswith(deepspeed_weights.PREFIX):
        deepspeed_weights.quantize(model, mode)
    elif mode not in DTYPES:
        check_device(mode, DTYPES[dtype], device)
        quantize_layers(model, mode)
    return model


@torch.no_grad()
def shuffle_features(model: Any) -> None:
    """Puts hidden and MLP features of a Llama into another order, in place: the same function, other neighbours.

    The demo's weights were made of 4-bit groups of 32, which int4 finds again and stores without loss; of shuffled
    ones it shows what it does to weights that were not.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    body = model.model
    body.embed_tokens.weight.data = body.embed_tokens.weight.data[:, hidden]
    if model.lm_head.weight is not body.embed_tokens.weight:
        model.lm_head.weight.data = model.lm_head.weight.data[:, hidden]
    body.norm.weight.data = body.norm.weight.data[hidden]
    for layer in body.layers:
        inner = torch.randperm(model.config.intermediate_size, generator=generator)
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[hidden]
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.data = reader.weight.data[:, hidden]
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.data = writer.weight.data[hidden]
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.data = part.weight.data[inner]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, inner]


@torch.inference_mode()
def perplexity(model: Any, token_ids: torch.Tensor, window: int) -> float:
    """exp of the mean negative log likelihood of all tokens `[T]` but the first of each window."""
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, window):
        piece = token_ids[start : start + window + 1].to(model.device)
        logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
        count += len(piece) - 1
    return math.exp(total / count)


def main(
    model: str = typer.Argument(DEMO_MODEL, help="smollm2, a local Hugging Face folder, or a hub id"),
    modes: str = typer.Option(
        "bf16,fp32,int8,int4,deepspeed-int8,deepspeed-int4",
        help="dtypes, modes of deepspeed.quantization, and DeepSpeed's own, with commas",
    ),
    dtype: str = typer.Option("bf16", help="in which quantized weights are multiplied"),
    device: str = typer.Option("cpu", help="cpu or cuda"),
    tokens: int = typer.Option(4096, help="of the text"),
    window: int = typer.Option(512, help="tokens of context at most"),
    shuffle: bool = typer.Option(False, help="features in another order: see `shuffle_features`; Llama alone"),
) -> None:
    """Measure and print the table."""
    from transformers import AutoTokenizer

    from dsserve.core.errors import LoadError

    try:
        path = prepare(model)
        token_ids = AutoTokenizer.from_pretrained(path)(reference_text(), return_tensors="pt").input_ids[0][:tokens]
        say(f"{len(token_ids)} tokens of Python {platform.python_version()}'s language reference, windows of {window}")
        found: dict[str, float] = {}
        print("| weights | perplexity | to the first |\n| --- | --- | --- |")
        for mode in modes.split(","):
            found[mode] = perplexity(load(path, mode, dtype, torch.device(device), shuffle), token_ids, window)
            print(f"| {mode} | {found[mode]:.3f} | {found[mode] / next(iter(found.values())) - 1:+.2%} |", flush=True)
        result = {"model": model, "tokens": len(token_ids), "window": window, "shuffled": shuffle, "perplexity": found}
        print(json.dumps(result))
    except (ModelError, LoadError) as error:
        fail(str(error))


if __name__ == "__main__":
    typer.run(main)
