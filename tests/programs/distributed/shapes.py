"""Small random models of several architectures and head counts, for any number of ranks. Runs under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deepspeed_handler import DeepSpeedHandler
from dsserve.core.errors import LoadError
from dsserve.core.request import GenerationRequest
from dsserve.loading.ds_engine import shard_model
from dsserve.loading.shard_cache import find_shards, write_shards
from dsserve.loading.shard_manifest import Manifest
from dsserve.modeling.linear import pack_weights
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.warmup import verify_runner
from tests.support.contexts import make_context
from tests.support.paged import make_engine, make_scheduler
from tests.support.streams import Numbers, run

VOCABULARY, LAYERS = 199, 2
UNREAD = "the handler"
ROWS, NEW_TOKENS, CHECKED = 3, 10, 15
PROMPTS = tuple(
    tuple(torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (1, 17, 5, 33, 2, 9)
)


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


def qwen3(heads: int, kv_heads: int) -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=32, vocab_size=VOCABULARY, tie_word_embeddings=True,
        )
    )  # fmt: skip


def mistral(heads: int, kv_heads: int) -> Any:
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=24, vocab_size=VOCABULARY, sliding_window=None,
        )
    )  # fmt: skip


def gemma(kind: tuple[Any, Any], heads: int, kv_heads: int) -> Any:
    """Gemma 1, 2 and 3: scaled embeddings, norms of their own, 2 with capped logits, 3 with query and key norms."""
    network, config = kind
    return network(
        config(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=24, vocab_size=VOCABULARY, pad_token_id=0,
        )
    )  # fmt: skip


def phi3(heads: int, kv_heads: int) -> Any:
    return Phi3ForCausalLM(
        Phi3Config(
            hidden_size=16 * heads, intermediate_size=240, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=VOCABULARY, pad_token_id=0,
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
    "Llama 4/2": lambda: llama(4, 2),
    "Qwen2 8/4": lambda: qwen2(8, 4),
    "Qwen2 9/3": lambda: qwen2(9, 3),
    "Qwen3 8/2": lambda: qwen3(8, 2),
    "Mistral 8/2": lambda: mistral(8, 2),
    "Gemma 8/1": lambda: gemma((GemmaForCausalLM, GemmaConfig), 8, 1),
    "Gemma 2 8/4": lambda: gemma((Gemma2ForCausalLM, Gemma2Config), 8, 4),
    "Gemma 3 4/1": lambda: gemma((Gemma3ForCausalLM, Gemma3TextConfig), 4, 1),
    "Phi-3 8/2": lambda: phi3(8, 2),
    "Phi-3 8/4": lambda: phi3(8, 4),
    "OPT 8": lambda: opt(8),
    "OPT 9": lambda: opt(9),
    "GPT-NeoX 8": lambda: neox(8),
    "GPT-NeoX 9": lambda: neox(9),
    "BLOOM 8": lambda: bloom(8),
    "BLOOM 9": lambda: bloom(9),
}


def outcomes(folder: str, streams: list[str]) -> dict[str, dict[str, Any]]:
    """For each shape the largest logit error of the sharded module against transformers, the relative errors of the
    engine, as sharded and packed, and the rank's KV heads; or the refusal. For those in `streams` also the tokens of
    requests that share too few rows, and those of transformers' `generate`."""
    found = {name: outcome(make, folder, name in streams) for name, make in SHAPES.items()}
    return {**found, UNREAD: {"refused": load_unreadable(Path(folder))}}


def load_unreadable(folder: Path) -> str:
    """What the ready handler says of one attention head on several ranks; the file of weights is none."""
    path = folder / f"rank-{RankInfo.from_env().rank}"
    llama(1, 1).config.save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"unreadable")
    server = {"continuousBatching": True, "parallelType": "tp", "minWorkers": 1, "maxWorkers": 1}
    context = make_context(path, {**server, "deepspeed": {"dtype": "fp32"}, "handler": {"model_path": "."}})
    try:
        DeepSpeedHandler().initialize(context)
    except LoadError as error:
        return str(error)
    return ""


def outcome(make: Callable[[], Any], folder: str, stream: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().eval()
    randomize(model)
    token_ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        expected = model(token_ids).logits
    if stream:
        found["generated"] = [generate(model, prompt) for prompt in PROMPTS]
    try:
        engine = shard_model(model, make_context(Path(folder), {"deepspeed": {"dtype": "fp32"}}))
    except LoadError as error:
        return {"refused": str(error)}
    with torch.inference_mode():
        found["logits"] = (engine.module(token_ids).logits - expected).abs().max().item()
    found["largest"] = expected.abs().max().item()
    found["cached"] = is_the_same_from_cache(engine, make, Path(folder, "cache"), token_ids)
    check = shorten(engine.self_check)
    runner = make_runner(engine.module)
    found["engine"] = verify_runner(runner, check)
    found["kv_heads"] = runner.cache.layers[0].keys.shape[1]
    if stream:
        found["streamed"] = stream_tokens(runner)
    found["packed_layers"] = pack_weights(engine.module)
    found["packed"] = verify_runner(make_runner(engine.module), check)
    return found


def make_runner(module: Any) -> ModelRunner:
    return ModelRunner(module, KVSize.of_rows(ROWS, 64), RankInfo.from_env(), torch.device("cpu"))


def is_the_same_from_cache(engine: Any, make: Callable[[], Any], folder: Path, token_ids: torch.Tensor) -> bool:
    """Whether shards that are written and read again, into a model without weights, have the same logits to the bit."""
    rank = RankInfo.from_env()
    manifest = Manifest(
        architecture="", config="", source={}, tp_size=rank.world_size, dtype="float32", libraries={}
    )  # fmt: skip
    write_shards(engine.module, engine.self_check, manifest, folder, rank)
    with torch.device("meta"):
        outline = make().eval()
    shards = find_shards(manifest, folder, rank)
    again = shard_model(outline, make_context(folder, {"deepspeed": {"dtype": "fp32"}}), shards)
    with torch.inference_mode():
        return torch.equal(again.module(token_ids).logits, engine.module(token_ids).logits)


def shorten(check: SelfCheck) -> SelfCheck:
    """Its first tokens: a few decode steps after the prompts, since eight ranks on two cores take long for each."""
    return replace(check, token_ids=check.token_ids[:CHECKED], logits=check.logits[:CHECKED])


def randomize(model: Any) -> None:
    """Weights that make every part show in the logits: left out, it would change them by far more than 1e-4."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05 if "embed" in name or "head" in name else 0.3)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)


def generate(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens of transformers on the whole model."""
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def stream_tokens(runner: ModelRunner) -> list[list[int]]:
    """The same prompts through the engine, more than it has rows, which arrive while others run. On rank 0."""
    rank = RankInfo.from_env()
    engine = make_engine(runner, make_scheduler(runner.size), lambda _: Numbers(), rank)
    requests = [GenerationRequest(str(index), prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    texts = run(engine, rank, [requests[:2], requests[2:3], requests[3:]])
    return [texts[request.request_id] for request in requests]
