"""KV pages planned for a GPU on which little is free: the load finds memory for all it captures, and so do requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.model.random import write_tokenizer
from tests.support.low_memory import NEW_TOKENS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
CONTEXT, PROMPT = 32768, 900
COUNT = 280  # their prompts are more than all pages hold


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of its context takes 1 GiB in bf16, on one rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=8000, max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("long")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


@pytest.mark.parametrize("ranks", [1, 2], ids=["tp1", "tp2"])
def test_pages_are_as_many_as_fit_and_all_of_them_serve(long_context: Path, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, {torch.cuda.device_count()} visible")
    arguments = {"device_type": "gpu", "dtype": "bf16", "free_mib": [8192 // ranks] * ranks, "prompt": PROMPT}
    environment = {"DS_ACCELERATOR": "cuda"}
    found = run_ranks(
        "tests.support.low_memory:serve", ranks, env=environment, path=str(long_context), count=COUNT, **arguments
    )[0]
    assert 5 * CONTEXT <= found["tokens"] <= 7 * CONTEXT < COUNT * PROMPT
    assert [len(str(text).split()) for text in found["answers"].values()] == [NEW_TOKENS] * COUNT
