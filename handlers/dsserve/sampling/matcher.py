"""llguidance, and the only place that calls its constructors: a tokenizer's view, a grammar's matcher, what went wrong.

Needs no torch: the process that tries grammars out (`grammar_process`) is small and quick to start.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

# Symbols of a grammar. llguidance takes 500,000, which took 5 s; 50,000 take 0.6 s and hold 2,000 properties.
_MOST_SYMBOLS = 50_000
TOO_COMPLEX = "too complex: use fewer, shorter or simpler alternatives, patterns, ranges and multiples"
DEAD_END = "a text that matches it comes to a place where nothing may follow"


class GrammarError(ValueError):
    """A grammar that cannot be used, or a text that cannot go on; the message says why and may go to the sender."""


@dataclass(frozen=True)
class Vocabulary:
    """What llguidance has to know of a tokenizer.

    Attributes:
        text: the fast tokenizer as JSON.
        size: number of ids, at least the width of the logits.
        eos_ids: the tokens that end a text; none = the tokenizer's own.
    """

    text: str
    size: int
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, width: int, eos_ids: frozenset[int]) -> Vocabulary:
        """Of a fast transformers tokenizer and a model whose logits are `width` wide."""
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        ends = tuple(sorted(eos_ids)) or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
        return cls(backend.to_str(), max(width, len(tokenizer)), ends)

    def tokens(self) -> Any:
        """llguidance's view; takes 0.5 to 1 s."""
        from llguidance import LLTokenizer

        return LLTokenizer(self.text, n_vocab=self.size, eos_token=list(self.eos_ids) or None)


def make_matcher(tokens: Any, grammar: str) -> Any:
    """Compiles a grammar.

    Raises:
        GrammarError: llguidance does not take it.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_grammar_size=_MOST_SYMBOLS, verbose_errors=False)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(_reason(str(matcher.get_error())))
    return matcher


def read_mask(matcher: Any, width: int) -> np.ndarray:
    """The tokens that may come next, bool `[width]`.

    Raises:
        GrammarError: the matcher gave up, or nothing may come next.
    """
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    if matcher.is_error():
        raise GrammarError(_why_stopped(matcher))
    mask = np.unpackbits(bits, bitorder="little", count=width).astype(bool)
    if not mask.any():
        raise GrammarError(_why_stopped(matcher))
    return mask


def _why_stopped(matcher: Any) -> str:
    """In our words: llguidance's hold the text."""
    error = str(matcher.get_error())
    if error.startswith(("lexer error", "panic")) or "TooComplex" in str(matcher.stop_reason()):
        return TOO_COMPLEX
    return DEAD_END


def _reason(error: str) -> str:
    if error.startswith("panic"):
        return TOO_COMPLEX
    first, *others = error.strip().splitlines() or [""]
    # A regex' error shows the pattern in its first lines, and says in the last one what is wrong.
    why = next((line.removeprefix("error: ") for line in others if line.startswith("error: ")), "")
    return f"{first} {why}".strip()
