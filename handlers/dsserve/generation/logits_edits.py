"""What a request changes in its logits before a token is drawn: bias, penalties, banned tokens, a grammar's mask.

In the order of transformers' `generate`: bias, repetition penalty, then OpenAI's two penalties, which transformers
lacks, then bans. A step's edits of all rows are applied together: a few operations, however many rows. Does not
draw.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from dsserve.generation.request import SamplingParams

_NOTHING = np.zeros(0, dtype=np.int64)


class TokenHistory:
    """The tokens of one sequence, as its penalties need them.

    Args:
        prompt_ids: count for the repetition penalty alone.
        ending_ids: tokens that end the text, banned until there are `min_tokens` new ones.
    """

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...], ending_ids: frozenset[int]) -> None:
        self._params = params
        self._counts: Counter[int] = Counter()
        self._generated = 0
        self._ending = np.fromiter(ending_ids, dtype=np.int64)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._repeats = params.repetition_penalty != 1
        self._prompt = np.unique(np.asarray(prompt_ids, dtype=np.int64)) if self._repeats else _NOTHING
        self._penalizes = params.presence_penalty != 0 or params.frequency_penalty != 0

    @property
    def is_plain(self) -> bool:
        """Whether the next token's logits stay as they are."""
        edits = len(self._bias_ids) or self._repeats or self._penalizes
        return not (edits or self._generated < self._params.min_tokens)

    def add(self, token: int) -> None:
        """Enters a new token."""
        self._generated += 1
        if self._repeats or self._penalizes:
            self._counts[token] += 1

    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[n]` and what is added to their logits."""
        return self._bias_ids, self._bias

    def repeated(self) -> np.ndarray:
        """Each token of prompt and text once, where there is a repetition penalty."""
        if not self._repeats:
            return _NOTHING
        return np.union1d(self._prompt, np.fromiter(self._counts, dtype=np.int64, count=len(self._counts)))

    def penalties(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[n]` and what presence and frequency take off their logits."""
        if not self._penalizes:
            return _NOTHING, _NOTHING.astype(np.float32)
        ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
        return ids, self._params.presence_penalty + self._params.frequency_penalty * counts

    def banned(self) -> np.ndarray:
        """Token ids that must not come next."""
        return self._ending if self._generated < self._params.min_tokens else _NOTHING


def edit_logits(logits: torch.Tensor, histories: list[tuple[TokenHistory, float]]) -> None:
    """Applies the edits of each row, in place. `logits` is `[n, V]`, fp32, contiguous.

    Args:
        histories: of each row, with its repetition penalty.
    """
    flat, width = logits.view(-1), logits.shape[1]
    bias, repeated, factors, penalized, taken, banned = [], [], [], [], [], []
    added = []
    for row, (history, factor) in enumerate(histories):
        first = row * width
        ids, values = history.bias()
        bias.append(ids + first)
        added.append(values)
        ids = history.repeated()
        repeated.append(ids + first)
        factors.append(np.full(len(ids), factor, dtype=np.float32))
        ids, values = history.penalties()
        penalized.append(ids + first)
        taken.append(values)
        banned.append(history.banned() + first)

    def device(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(logits.device)

    if any(map(len, bias)):
        flat.index_add_(0, device(bias), device(added))
    if any(map(len, repeated)):
        at, factor_at = device(repeated), device(factors)
        found = flat[at]
        flat[at] = torch.where(found < 0, found * factor_at, found / factor_at)
    if any(map(len, penalized)):
        flat.index_add_(0, device(penalized), -device(taken))
    if any(map(len, banned)):
        flat[device(banned)] = float("-inf")


def mask_logits(row: torch.Tensor, grammar: Any) -> None:
    """Bans what a grammar does not allow next, in place. `row` is `[V]`; see `grammar.Grammar.allowed`."""
    allowed = torch.from_numpy(grammar.allowed(row.shape[0])).to(row.device)
    row.masked_fill_(~allowed, float("-inf"))
