"""Structured output: which tokens a text may go on with, by llguidance.

Rank 0 alone asks and all ranks get the token that it chose, so a mask cannot differ between ranks. Does not read
`response_format` or tools (`protocol.openai.structured`).
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dsserve.sampling.grammar_process import GrammarBusyError, GrammarProcess
from dsserve.sampling.matcher import GrammarError, Vocabulary, make_matcher, read_mask

__all__ = ["Grammar", "GrammarBusyError", "GrammarCompiler", "GrammarError"]

# Grammars that are kept compiled: clients tend to send the same schema again.
_KEPT = 16
_KEPT_BYTES = 256 * 2**20
_KEPT_REFUSALS = 256
# A grammar that takes longer to compile is not compiled again between two tokens: streams wait for it.
_QUICK_S = 0.1


@dataclass(frozen=True)
class _Compiled:
    """The matcher that all texts of a grammar are copies of: compiling takes up to a second, a copy none."""

    matcher: Any
    seconds: float  # of the processor, that compiling took
    nbytes: int


class GrammarCompiler:
    """Makes grammars for one tokenizer. What it needs of it is made when the first request needs it (1 s).

    Args:
        tokenizer: a fast transformers tokenizer.
        vocabulary: width of the model's logits.
        eos_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._width = vocabulary
        self._eos_ids = eos_ids
        self._process: GrammarProcess | None = None
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()  # the one that was used last is last
        self._refused: OrderedDict[bytes, str] = OrderedDict()  # a grammar's digest -> what is wrong with it

    def check(self, grammar: str) -> None:
        """Compiles a grammar, in a process of its own first.

        Raises:
            GrammarError: llguidance does not take it, no text can match it, or it costs too much.
            GrammarBusyError: the machine is too busy to find out.
        """
        if grammar in self._compiled:
            return
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest in self._refused:
            self._refused.move_to_end(digest)
            raise GrammarError(self._refused[digest])
        verdict = self._started().judge(grammar)
        if verdict.fault is not None:
            self._refused[digest] = verdict.fault
            if len(self._refused) > _KEPT_REFUSALS:
                self._refused.popitem(last=False)
            raise GrammarError(verdict.fault)
        self._compile(grammar, verdict.nbytes)

    def start(self, grammar: str) -> Grammar:
        """A matcher at the beginning of a text, of a grammar that was checked."""
        compiled = self._compiled.get(grammar) or self._compile(grammar)
        self._compiled.move_to_end(grammar)
        return Grammar(compiled.matcher.deep_copy(), self._eos_ids, lambda: self._renew(grammar, compiled))

    def close(self) -> None:
        """Ends the process; the next new grammar starts another one."""
        if self._process is not None:
            self._process.close()

    def _started(self) -> GrammarProcess:
        if self._process is None:
            process = GrammarProcess(self._vocabulary)
            process.start()
            _ = self._tokens  # made while the process makes its own
            self._process = process
        return self._process

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._tokenizer, self._width, self._eos_ids)

    @cached_property
    def _tokens(self) -> Any:
        return self._vocabulary.tokens()

    def _compile(self, grammar: str, nbytes: int = 0) -> _Compiled:
        started = time.thread_time()
        matcher = make_matcher(self._tokens, grammar)
        compiled = _Compiled(matcher, time.thread_time() - started, nbytes + len(grammar))
        self._compiled[grammar] = compiled
        total = sum(kept.nbytes for kept in self._compiled.values())
        while len(self._compiled) > 1 and (len(self._compiled) > _KEPT or total > _KEPT_BYTES):
            total -= self._compiled.popitem(last=False)[1].nbytes
        return compiled

    def _renew(self, grammar: str, failed: _Compiled) -> Any:
        """Forgets a matcher that failed; returns a new one that nobody shares, or None where that takes long."""
        if self._compiled.get(grammar) is failed:
            del self._compiled[grammar]
        return make_matcher(self._tokens, grammar) if failed.seconds < _QUICK_S else None


class Grammar:
    """One text's place in its grammar.

    Args:
        renew: called when the matcher failed; a matcher at the beginning, or None.
    """

    def __init__(self, matcher: Any, eos_ids: frozenset[int], renew: Callable[[], Any]) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._renew: Callable[[], Any] | None = renew
        self._taken: list[int] = []

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def allowed(self, width: int) -> np.ndarray:
        """The tokens that may come next, bool `[width]`.

        Raises:
            GrammarError: the matcher gave up, or nothing may come next. The request cannot go on.
        """
        try:
            return read_mask(self._matcher, width)
        except GrammarError:
            # All texts of a grammar share its lexer, which fails for all of them when it fails for one.
            own = self._renew() if self._renew is not None else None
            self._renew = None
            if own is None:
                raise
        for token in self._taken:
            own.consume_token(token)
        self._matcher = own
        return read_mask(own, width)

    def accept(self, token: int) -> None:
        """Enters the chosen token; an end-of-text token ends the text and is not part of it."""
        if token not in self._eos_ids:
            self._taken.append(token)
            self._matcher.consume_token(token)
