"""Models of random weights in the shapes of known ones, with a tokenizer of numbered words: to measure without a hub.

Written tensor by tensor as sharded safetensors, so that a model larger than memory can be made. Their texts mean
nothing, and their tokens are no measure of exactness.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

LLAMA_6_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
# Of Llama-3.1's config.json.
LLAMA_3_1_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# SmolLM2-135M, Llama-2-7B, Llama-3.1-8B, CodeLlama-34B, Llama-2-70B, OPT-6.7B (each with a head of its own); tiny ones
# for tests. A shape that names no context has `CONTEXT`.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-135m": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    }),
    "llama-6.7b": ("llama", LLAMA_6_7B),
    "llama-8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA_3_1_ROPE,
    }),
    "llama-34b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    }),
    "llama-70b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    }),
    "opt-6.7b": ("opt", {
        "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 50272,
    }),
    "llama-tiny": ("llama", {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    }),
    "opt-tiny": ("opt", {
        "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 512,
    }),
}  # fmt: skip
CONTEXT = 4096
_WRITERS = 8  # files at once, each of which is one layer in memory
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def prepare_random(shape: str, dtype: str, folder: Path) -> Path:
    """The folder of a model of this shape below `folder`, made where it is not there yet."""
    model = folder / f"{shape}-{dtype}"
    if not (model / "tokenizer.json").is_file():  # written last
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        config = make_config(shape, TORCH_DTYPES[dtype])
        write_checkpoint(model, config)
        write_tokenizer(model, config.vocab_size, config.max_position_embeddings)
    return model


def make_config(shape: str, dtype: torch.dtype) -> Any:
    """transformers' configuration of a shape."""
    from transformers import AutoConfig

    kind, sizes = SHAPES[shape]
    return AutoConfig.for_model(
        kind, **{"max_position_embeddings": CONTEXT, **sizes}, tie_word_embeddings=False, dtype=dtype,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def write_checkpoint(folder: Path, config: Any) -> None:
    """config.json and random weights in the configuration's dtype, a file a layer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        before, layers, after = name.partition(".layers.")
        groups.setdefault(f"{before}{layers}{after.split('.')[0]}" if layers else "ends", []).append(name)
    files = {
        f"model-{count:05d}-of-{len(groups):05d}.safetensors": names for count, names in enumerate(groups.values(), 1)
    }

    def write(count: int, file: str) -> None:
        names = files[file]
        tensors = {name: _random(shapes[name], name.endswith("bias"), config.dtype, count) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})

    matrices = {shape for shape in shapes.values() if len(shape) > 1}
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda shape: _drawn(shape, config.dtype), matrices))
        list(pool.map(write, itertools.count(1), files))
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _random(shape: torch.Size, is_bias: bool, dtype: torch.dtype, layer: int) -> torch.Tensor:
    """A bias's zeros, a norm's ones, or numbers of which every layer holds the same rolled by a row: drawing 10^10 of
    them takes minutes."""
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype) if is_bias else torch.ones(shape, dtype=dtype)
    return _drawn(shape, dtype).roll(layer, 0).contiguous()


@functools.cache
def _drawn(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=torch.Generator().manual_seed(len(shape)))


def write_tokenizer(folder: Path, vocabulary: int, context: int = CONTEXT) -> None:
    """Token n is the word `tn`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", model_max_length=context).save_pretrained(folder)


def draw_prompts(vocabulary: int, length: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of token ids that share nothing, the same at every call with this seed."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return [tuple(row) for row in torch.randint(1, vocabulary, (count, length), generator=generator).tolist()]


def as_text(prompt: tuple[int, ...]) -> str:
    """What the tokenizer reads as these tokens."""
    return " ".join(f"t{token}" for token in prompt)
