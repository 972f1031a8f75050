"""The token ids that end a text, and what a tokenizer holds that its model does not.

Does not end texts (`generation`) and does not look at prompts (`protocol`).
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids of generation_config.json and the tokenizer's `eos_token`, as in vLLM; those beyond the vocabulary are
    dropped. What is added and what is dropped stands in the log."""
    configured = _ids(getattr(model.generation_config, "eos_token_id", None))
    own = _ids(tokenizer.eos_token_id)
    if configured and not own <= configured:
        logger.info(
            "[dsserve] token %d (eos_token of tokenizer_config.json) ends a text, too; generation_config.json has %s",
            min(own - configured), sorted(configured),
        )  # fmt: skip
    found, vocabulary = configured | own, vocabulary_size(model)
    known = frozenset(number for number in found if 0 <= number < vocabulary)
    if found - known:
        logger.warning(
            "[dsserve] end-of-text ids %s are beyond the model's vocabulary of %d and end nothing",
            sorted(found - known), vocabulary,
        )  # fmt: skip
    if not known:
        logger.warning("[dsserve] the model has no end-of-text id: texts end at max_new_tokens or at a stop string")
    return known


def warn_of_extra_tokens(model: Any, tokenizer: Any) -> None:
    """Says in the log which of the tokenizer's ids are beyond the vocabulary: a prompt that holds one is refused."""
    vocabulary = vocabulary_size(model)
    extra = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocabulary)
    if extra:
        logger.warning(
            "[dsserve] the tokenizer has %d token(s) beyond the model's vocabulary of %d, the first %r (id %d): "
            "prompts with them are refused; resize the model's embeddings, or use the tokenizer that belongs to it",
            len(extra), vocabulary, extra[0][1], extra[0][0],
        )  # fmt: skip


def vocabulary_size(model: Any) -> int:
    """The ids that the model has embeddings for, whole or on the meta device."""
    return int(model.get_input_embeddings().weight.shape[0])


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list | tuple | set | frozenset) else [value]
    return frozenset(number for number in values if isinstance(number, int))
