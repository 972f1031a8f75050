"""Ranks that do not see the same memory plan the same KV rows, and serve with them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.random_model import write_tokenizer
from tests.ranks import run_ranks
from tests.tight import NEW_TOKENS


def test_ranks_agree_on_the_slots_of_the_one_that_has_least(tmp_path: Path) -> None:
    """A rank's row is 1 MiB in fp32, and two ranks share the memory that each of them sees: 9 rows, and 4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=500, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, config.vocab_size)
    arguments = {"device_type": "cpu", "dtype": "fp32", "free_mib": [20, 10], "prompt": 30, "count": 9}
    leader, other = run_ranks("tests.tight:serve", 2, path=str(tmp_path), **arguments)
    assert leader["slots"] == other["slots"] == 4
    assert [len(str(text).split()) for text in leader["answers"].values()] == [NEW_TOKENS] * 9
