"""Structured output: which tokens a text may go on with, by llguidance.

Rank 0 alone asks and all ranks get the token that it chose, so a mask cannot differ between ranks. Does not read
`response_format` or tools (`protocol.structured`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Grammars that are kept compiled: clients tend to send the same schema again.
_KEPT = 8


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why."""


class GrammarCompiler:
    """Makes grammars for one tokenizer. llguidance's view of it is built when the first request needs it (0.5 s).

    Args:
        tokenizer: a fast transformers tokenizer.
        vocabulary: width of the model's logits.
        eos_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._known: Any = None
        self._compiled: dict[str, Any] = {}

    def check(self, grammar: str) -> None:
        """Raises GrammarError for one that llguidance does not take, or that no text can match."""
        from llguidance import LLMatcher

        if grammar in self._compiled:
            return
        reason = LLMatcher.validate_grammar(grammar, self._tokens())
        if reason:
            raise GrammarError(reason.strip().splitlines()[0])
        # Only the first mask tells of some faults, of a schema that refers to itself for ever for example.
        first = self._compile(grammar).deep_copy()
        first.compute_bitmask()
        if first.is_error():
            del self._compiled[grammar]
            raise GrammarError("no text can match it")

    def start(self, grammar: str) -> Grammar:
        """A matcher at the beginning of a text."""
        return Grammar(self._compile(grammar).deep_copy(), self._eos_ids)

    def _compile(self, grammar: str) -> Any:
        """The matcher that all texts of a grammar are copies of: compiling takes up to a second, a copy none."""
        from llguidance import LLMatcher

        if grammar not in self._compiled:
            if len(self._compiled) >= _KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = LLMatcher(self._tokens(), grammar, log_level=0)
        return self._compiled[grammar]

    def _tokens(self) -> Any:
        if self._known is None:
            from llguidance.hf import from_tokenizer

            size = max(self._vocabulary, len(self._tokenizer))
            self._known = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=sorted(self._eos_ids) or None)
        return self._known


class Grammar:
    """One text's place in its grammar."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, width: int) -> np.ndarray:
        """The tokens that may come next, bool `[width]`.

        Raises:
            GrammarError: the matcher gave up; the request cannot go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarError("the grammar's matcher stopped")
        return np.unpackbits(bits, bitorder="little", count=width).astype(bool)

    def accept(self, token: int) -> None:
        """Enters the chosen token; an end-of-text token ends the text and is not part of it."""
        if token not in self._eos_ids:
            self._matcher.consume_token(token)
