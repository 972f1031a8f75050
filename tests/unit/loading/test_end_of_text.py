"""Which ids end a text, and what the log says of those that come from elsewhere or lie beyond the vocabulary."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsserve.loading.end_of_text import end_ids, warn_of_extra_tokens

VOCABULARY = 100


def model(configured: Any) -> Any:
    embeddings = torch.nn.Embedding(VOCABULARY, 2, device="meta")
    settings = SimpleNamespace(eos_token_id=configured)
    return SimpleNamespace(generation_config=settings, get_input_embeddings=lambda: embeddings)


def tokenizer(own: int | None, **extra: int) -> Any:
    return SimpleNamespace(eos_token_id=own, get_vocab=lambda: {"<a>": 0, "<z>": VOCABULARY - 1, **extra})


@pytest.mark.parametrize(
    ("configured", "own", "expected", "words"),
    [
        (None, None, set(), ["no end-of-text id"]),
        (None, 7, {7}, []),
        (7, None, {7}, []),
        (7, 7, {7}, []),
        ([7, 8], 8, {7, 8}, []),
        (
            [7, 8],
            9,
            {7, 8, 9},
            ["token 9 (eos_token of tokenizer_config.json) ends a text, too", "generation_config.json has [7, 8]"],
        ),
        (0, 9, {0, 9}, ["token 9"]),
        (VOCABULARY, 7, {7}, ["token 7", f"ids [{VOCABULARY}] are beyond the model's vocabulary of {VOCABULARY}"]),
        ([7, VOCABULARY - 1], VOCABULARY, {7, VOCABULARY - 1}, [f"ids [{VOCABULARY}] are beyond"]),
        (-1, None, set(), ["ids [-1]", "no end-of-text id"]),
        ([VOCABULARY, VOCABULARY + 5], None, set(), ["ids [100, 105]", "no end-of-text id"]),
    ],
)
def test_ids_of_both_files_end_a_text_if_the_model_has_them(
    configured: Any, own: int | None, expected: set[int], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dsserve"):
        assert end_ids(model(configured), tokenizer(own)) == expected
    for word in words:
        assert word in caplog.text
    assert bool(words) == bool(caplog.text)


def test_tokens_beyond_the_vocabulary_are_counted_and_the_first_is_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_extra_tokens(model(7), tokenizer(7))
    assert not caplog.text
    warn_of_extra_tokens(model(7), tokenizer(7, **{"<pad>": VOCABULARY + 1, "<new>": VOCABULARY}))
    assert "2 token(s) beyond the model's vocabulary of 100, the first '<new>' (id 100)" in caplog.text
