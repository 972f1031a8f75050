"""A grammar tried out before texts rely on it: compiled, and followed for some steps in a few directions.

Only a step tells of some faults: a schema that refers to itself for ever, a lexer that gives up at the third digit, a
name that must and must not match a pattern. Has no limits of its own (`grammar_process`).
"""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

from dsserve.sampling.matcher import DEAD_END, GrammarError, make_matcher, read_mask

_WALKS = 16
_CHOICES = 64  # of a walk; forced steps are quick
_STEPS = 1024
_WALKING_S = 0.2  # of the processor
# JSON's own characters lead through a schema; other tokens stay within its first string.
_LEADING = '{}[]:,"0123456789.-etfn'
_LEADING_SHARE = 0.8


def rehearse(tokens: Any, grammar: str) -> Any:
    """Compiles a grammar and takes its first steps; returns the matcher, at its beginning.

    Args:
        tokens: llguidance's view of the tokenizer.

    Raises:
        GrammarError: it cannot be compiled, no text can match it, or texts come to an end where they may not end.
    """
    matcher = make_matcher(tokens, grammar)
    leading = np.zeros(tokens.vocab_size, dtype=bool)
    for character in _LEADING:
        ids = tokens.tokenize_str(character)
        if len(ids) == 1:
            leading[ids[0]] = True
    _check_beginning(matcher.deep_copy(), len(leading))
    until = time.process_time() + _WALKING_S
    chance = random.Random(0)
    for walk in range(_WALKS):
        _walk(matcher.deep_copy(), leading, frozenset(tokens.eos_tokens), chance)
        if walk and time.process_time() > until:
            break
    return matcher


def _check_beginning(matcher: Any, width: int) -> None:
    try:
        read_mask(matcher, width)
    except GrammarError as error:
        raise GrammarError("no text can match it" if str(error) == DEAD_END else str(error)) from None


def _walk(matcher: Any, leading: np.ndarray, eos_ids: frozenset[int], chance: random.Random) -> None:
    choices = 0
    for _ in range(_STEPS):
        if matcher.is_stopped() and not matcher.is_error():
            return
        mask = read_mask(matcher, len(leading))
        for token in eos_ids:
            mask[token] = False
        ways = np.flatnonzero(mask & leading) if chance.random() < _LEADING_SHARE else np.empty(0)
        if not len(ways):
            ways = np.flatnonzero(mask)
        if not len(ways):
            return
        choices += len(ways) > 1
        if choices > _CHOICES:
            return
        matcher.consume_token(int(ways[chance.randrange(len(ways))]))
