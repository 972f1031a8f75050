"""A real folder whose tokenizer and generation_config.json name different ends, or tokens that the model lacks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import GenerationConfig

from dsserve.config.handler import HandlerConfig
from dsserve.loading.hf_model import LoadedModel, load_model
from tests.contract import tiny
from tests.support.tiny_models import make_tokenizer


def load(folder: Path) -> LoadedModel:
    return load_model(HandlerConfig(model_path=str(folder)), folder)


def test_both_files_ends_end_a_text_and_what_the_model_lacks_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_model(tmp_path, "llama")
    tokenizer = make_tokenizer(eos_token="A")
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[7, tiny.VOCABULARY + 3]).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="dsserve"):
        assert load(tmp_path).eos_ids == {7, tokenizer.eos_token_id}
    assert f"token {tokenizer.eos_token_id} (eos_token of tokenizer_config.json) ends a text, too" in caplog.text
    assert f"end-of-text ids [{tiny.VOCABULARY + 3}] are beyond the model's vocabulary" in caplog.text


def test_an_added_token_that_the_model_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save_model(tmp_path, "llama")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new {number}>" for number in range(tiny.VOCABULARY + 2 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path)
    assert "the tokenizer has 2 token(s) beyond the model's vocabulary of 512" in caplog.text
    assert "the model has no end-of-text id" in caplog.text
