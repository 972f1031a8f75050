"""The tokens of one sequence, as its penalties, bias and bans need them each step. Does not change logits."""

from __future__ import annotations

import numpy as np

from dsserve.core.request import SamplingParams

_NOTHING = np.zeros(0, dtype=np.int64)
_ROOM = 64


class TokenCounts:
    """Different tokens and how often each came, as arrays that grow with the text instead of being made every step.

    Args:
        ids: tokens that are there from the beginning, each once, with a count of 0.
    """

    def __init__(self, ids: np.ndarray = _NOTHING) -> None:
        self._places = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = np.concatenate([ids, np.zeros(_ROOM, dtype=np.int64)])
        self._times = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Counts a token."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[place] = token
        self._times[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """The different tokens, `[n]`, int64, in the order in which they came."""
        return self._ids[: len(self._places)]

    @property
    def times(self) -> np.ndarray:
        """How often each came, `[n]`, fp32."""
        return self._times[: len(self._places)]


class TokenHistory:
    """The tokens of one sequence, as its penalties need them.

    Args:
        prompt_ids: count for the repetition penalty alone.
        ending_ids: tokens that end the text, banned until there are `min_tokens` new ones.
    """

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...], ending_ids: frozenset[int]) -> None:
        self._params = params
        self._generated = 0
        self._ending = np.fromiter(ending_ids, dtype=np.int64)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._repeats = params.repetition_penalty != 1
        self._seen = TokenCounts(np.unique(np.asarray(prompt_ids, dtype=np.int64)) if self._repeats else _NOTHING)
        self._penalizes = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._counts = TokenCounts()

    @property
    def is_plain(self) -> bool:
        """Whether the next token's logits stay as they are."""
        edits = len(self._bias_ids) or self._repeats or self._penalizes
        return not (edits or self._generated < self._params.min_tokens)

    def add(self, token: int) -> None:
        """Enters a new token."""
        self._generated += 1
        if self._repeats:
            self._seen.add(token)
        if self._penalizes:
            self._counts.add(token)

    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[n]` and what is added to their logits."""
        return self._bias_ids, self._bias

    def repeated(self) -> np.ndarray:
        """Each token of prompt and text once, where there is a repetition penalty."""
        return self._seen.ids

    def penalties(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[n]` and what presence and frequency take off their logits."""
        counts = self._counts
        return counts.ids, self._params.presence_penalty + self._params.frequency_penalty * counts.times

    def banned(self) -> np.ndarray:
        """Token ids that must not come next."""
        return self._ending if self._generated < self._params.min_tokens else _NOTHING
