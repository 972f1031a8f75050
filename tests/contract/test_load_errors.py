"""What is not served ends the load in one line that names it and says what to do: tiny models of many architectures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import deepspeed_handler
from dsserve.config.handler import HandlerConfig
from dsserve.core.errors import LoadError
from dsserve.core.request import GenerationRequest, SamplingParams, StopConditions
from dsserve.loading.hf_model import load_model
from tests.support.contexts import make_context
from tests.support.tiny_models import CONTEXT, RECIPES, SHAPE, make_tokenizer, save_config, save_model, settings

NEW = 6
STATES = "keep states of their own"
# Architectures that are refused, what the line says, and whether `make test` tries them.
REFUSED: dict[str, tuple[list[str], bool]] = {
    "falcon_rw": (["FalconForCausalLM", "ValueError", "modeling_falcon.py", "warm-up"], True),
    "gemma3n": (["Gemma3nForCausalLM", "cache.py"], False),
    "deepseek_v32": (["DeepseekV32ForCausalLM", "update_indexer"], True),
    "inkling": (["InklingForCausalLM", "conv state"], False),
    "gpt_neo": (["GPTNeo", "self-check"], False),
    "openai_gpt": (["OpenAIGPTLMHeadModel", "RuntimeError", "modeling_openai.py"], False),
    "qwen3_next": (["Qwen3NextForCausalLM", STATES, "linear_attention"], True),
    "lfm2": (["Lfm2ForCausalLM", STATES, "conv"], True),
    "mamba": (["MambaForCausalLM", STATES], True),
    "minimax": (["MiniMaxForCausalLM", STATES], False),
    "falcon_h1": (["FalconH1ForCausalLM", STATES], True),
    **{
        name: ([STATES], False)
        for name in (
            "qwen3_5", "granitemoehybrid", "jamba", "bamba", "nemotron_h", "kimi_linear", "mamba2", "recurrent_gemma",
            "lfm2_moe", "olmo_hybrid", "zamba2", "falcon_mamba", "xlstm", "rwkv", "deepseek_v4",
        )
    },
}  # fmt: skip
SERVED = sorted(RECIPES.keys() - REFUSED)


def long_unless(quick: bool, *values: Any, name: str) -> Any:
    return pytest.param(*values, id=name, marks=[] if quick else [pytest.mark.long])


def refusal(folder: Path, caplog: pytest.LogCaptureFixture, **handler: Any) -> str:
    """The one line with which the load of a folder ends, which is in the log too."""
    with caplog.at_level(logging.INFO), pytest.raises(LoadError) as info:
        deepspeed_handler.DeepSpeedHandler().initialize(make_context(folder, settings(folder, **handler)))
    lines = [record.getMessage() for record in caplog.records if "LoadError" in record.getMessage()]
    assert lines == [f"[dsserve] LoadError: {info.value}"] and "\n" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(("name", "words"), [long_unless(q, n, words, name=n) for n, (words, q) in REFUSED.items()])
def test_an_architecture_that_is_not_served_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, words: list[str]
) -> None:
    line = refusal(save_model(tmp_path, name), caplog)
    assert all(word in line for word in words)


@pytest.mark.parametrize("name", [long_unless(name in ("llama", "hunyuan_moe"), name, name=name) for name in SERVED])
def test_the_others_give_transformers_tokens(tmp_path: Path, name: str) -> None:
    """Also one whose router asks a layer for its weight, which is not packed then."""
    handler = deepspeed_handler.DeepSpeedHandler()
    handler.initialize(make_context(tmp_path, settings(save_model(tmp_path, name))))
    prompts = [tuple(range(first, first + length)) for first, length in ((7, 1), (30, 9), (100, 70))]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert served(handler, prompts) == [expected(model, prompt) for prompt in prompts]


def served(handler: Any, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """The greedy tokens of prompts that are sent at once."""
    found: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        stop = StopConditions(ignore_eos=True)
        handler._leader.engine.admit(GenerationRequest(str(number), prompt, NEW, SamplingParams(logprobs=1), stop))
    while any(len(tokens) < NEW for tokens in found.values()):
        for event in handler._leader.engine.run(4, 60.0):
            assert not event.failed
            found[event.request_id] += [one.token for one in event.logprobs]
    return list(found.values())


@torch.inference_mode()
def expected(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """The same of transformers, which reads the whole text for each token."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def as_saved_by(kind: str) -> Callable[[Path], None]:
    """A Llama that another class than the causal language model saved."""

    def make(folder: Path) -> None:
        config = AutoConfig.for_model("llama", **SHAPE, num_labels=3)
        save_config(folder, getattr(transformers, kind), config)

    return make


def of_type(model_type: str, architecture: str) -> Callable[[Path], None]:
    """A config.json alone: what it says is read before any weights."""

    def make(folder: Path) -> None:
        content = {**AutoConfig.for_model(model_type).to_dict(), "architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps(content, default=str))

    return make


def with_files(**files: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return make


LORA = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base-7b"})
FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a LoRA adapter": (
        with_files(adapter_config__json=LORA, adapter_model__safetensors=""),
        ["PEFT adapter", "'org/base-7b'", "merge_and_unload"],
    ),
    "an adapter of a broken config": (with_files(adapter_config__json="{"), ["PEFT adapter", "a base model"]),
    "Mistral's own format": (
        with_files(params__json="{}", consolidated__safetensors=""),
        ["no config.json", "params.json", "convert"],
    ),
    "a folder of GGUF": (with_files(model__gguf=""), ["no config.json", "model.gguf", "llama.cpp"]),
    "GGUF beside config.json": (
        lambda folder: (of_type("llama", "LlamaForCausalLM")(folder), with_files(q4__gguf="")(folder))[0],
        ["no weights", "q4.gguf", "not served"],
    ),
    "a diffusion pipeline": (with_files(model_index__json="{}"), ["diffusion", "causal language models"]),
    "a classifier": (
        as_saved_by("LlamaForSequenceClassification"),
        ["LlamaForSequenceClassification", "another task", "causal language models"],
    ),
    "an embedding model": (as_saved_by("LlamaModel"), ["LlamaModel", "no language head", "causal language models"]),
    "a vision-language model": (
        of_type("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ["Qwen2_5_VLForConditionalGeneration", "a vision-language model", "causal language models"],
    ),
    "an encoder-decoder": (of_type("t5", "T5ForConditionalGeneration"), ["T5For", "an encoder-decoder model"]),
    "an encoder": (of_type("modernbert", "ModernBertModel"), ["ModernBertModel", "an encoder"]),
    "a speech model": (of_type("wav2vec2", "Wav2Vec2ForCTC"), ["Wav2Vec2ForCTC", "a speech model"]),
    "an image model": (of_type("vit", "ViTModel"), ["ViTModel", "an image model"]),
    "a config that is no object": (with_files(config__json="[1, 2]"), ["handler.model_path", "could not be loaded"]),
    "a config of wrong values": (
        with_files(config__json='{"model_type": "llama", "hidden_size": "wide"}'),
        ["hidden_size", "could not be loaded"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_described(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    make, words = FOLDERS[kind]
    make(tmp_path)
    line = refusal(tmp_path, caplog)
    assert str(tmp_path) in line and all(word in line for word in words)
    assert len(line) < 700


def test_an_embedding_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_saved_by("LlamaModel")(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("a long load"))
    assert "no language head" in refusal(tmp_path, caplog)


def test_a_file_is_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF")
    line = refusal(file, caplog)
    assert "GGUF file" in line and "model-q4.gguf" in line and "no folder" not in line


def test_an_adapter_beside_a_model_is_said_not_to_be_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text(LORA)
    with caplog.at_level(logging.WARNING):
        deepspeed_handler.DeepSpeedHandler().initialize(make_context(tmp_path, settings(tmp_path, warmup=False)))
    assert any("adapter is not applied" in record.getMessage() for record in caplog.records)


def test_a_context_that_yarn_scaling_reaches_says_how(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    line = refusal(save_model(tmp_path, "llama", max_position_embeddings=64, rope_parameters=yarn), caplog)
    assert f"max_position_embeddings: {CONTEXT} in config.json" in line and "yarn" in line


def test_a_tokenizer_file_that_no_package_reads_names_the_packages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ImportError("`tiktoken` is required to read a `tiktoken` file")

    save_model(tmp_path, "llama")
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    line = refusal(tmp_path, caplog)
    assert "tokenizer.model" in line and "sentencepiece" in line and "protobuf" in line


def test_a_sentencepiece_file_alone_is_served_as_its_library_reads_it(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    save_model(tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')
    (tmp_path / "corpus").write_text("\n".join(f"the quick brown fox {n} jumps over lazy dogs" for n in range(500)))
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    own = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    config = HandlerConfig(model_path=str(tmp_path))
    tokenizer = load_model(config, tmp_path).tokenizer
    for text in ("the quick fox", "lazy 42 dogs!", "Ça va?"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)


def test_the_tokenizer_of_these_tests_is_whole() -> None:
    assert make_tokenizer().decode(make_tokenizer()("Ça va?").input_ids) == "Ça va?"


def test_the_settings_threads_count_on_one_rank(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        save_model(tmp_path, "llama")
        handler = deepspeed_handler.DeepSpeedHandler()
        handler.initialize(make_context(tmp_path, settings(tmp_path, warmup=False, num_threads=before + 2)))
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)
