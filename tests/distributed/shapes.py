"""Small random models of several architectures and head counts, for any number of ranks. Runs under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dsserve.ds_engine import get_ds_engine
from dsserve.errors import LoadError
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.warmup import verify_runner
from dsserve.packing import pack_weights
from tests.contexts import make_context

VOCABULARY, LAYERS = 199, 2


def llama(heads: int, kv_heads: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=VOCABULARY, tie_word_embeddings=False,
        )
    )  # fmt: skip


def qwen2(heads: int, kv_heads: int) -> Any:
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=VOCABULARY, tie_word_embeddings=True,
        )
    )  # fmt: skip


def opt(heads: int) -> Any:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=16 * heads, ffn_dim=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            vocab_size=VOCABULARY, max_position_embeddings=256, word_embed_proj_dim=16 * heads,
        )
    )  # fmt: skip


def neox(heads: int) -> Any:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            vocab_size=VOCABULARY,
        )
    )  # fmt: skip


def bloom(heads: int) -> Any:
    return BloomForCausalLM(
        BloomConfig(hidden_size=16 * heads, n_layer=LAYERS, n_head=heads, vocab_size=VOCABULARY)
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {
    "Llama 8/8": lambda: llama(8, 8),
    "Llama 8/4": lambda: llama(8, 4),
    "Llama 8/2": lambda: llama(8, 2),
    "Llama 9/3": lambda: llama(9, 3),
    "Qwen2 8/4": lambda: qwen2(8, 4),
    "Qwen2 9/3": lambda: qwen2(9, 3),
    "OPT 8": lambda: opt(8),
    "OPT 9": lambda: opt(9),
    "GPT-NeoX 8": lambda: neox(8),
    "GPT-NeoX 9": lambda: neox(9),
    "BLOOM 8": lambda: bloom(8),
    "BLOOM 9": lambda: bloom(9),
}


def outcomes(folder: str) -> dict[str, dict[str, Any]]:
    """For each shape the largest logit error of the sharded module against transformers, and the relative errors of the
    engine, as sharded and packed; or the refusal."""
    return {name: outcome(make, folder) for name, make in SHAPES.items()}


def outcome(make: Callable[[], Any], folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # away from zero, so that a part that is left out shows
        torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() > 1 else 0.5)
    token_ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        expected = model(token_ids).logits
    try:
        context = make_context(Path(folder), {"deepspeed": {"dtype": "fp32", "self_check": True}})
        engine = get_ds_engine(model, context)
        with torch.inference_mode():
            found["logits"] = (engine.module(token_ids).logits - expected).abs().max().item()
        found["largest"] = expected.abs().max().item()
        found["engine"] = verify_runner(ModelRunner(engine.module, 2, 64, torch.device("cpu")), engine.self_check)
        pack_weights(engine.module)
        found["packed"] = verify_runner(ModelRunner(engine.module, 2, 64, torch.device("cpu")), engine.self_check)
    except LoadError as error:
        found["refused"] = str(error)
    except Exception as error:
        found["raised"] = f"{type(error).__name__}: {error}"
    return found
