"""The tokens of one sequence, as the edits of its logits need them each step. Does not change logits."""

from __future__ import annotations

import numpy as np

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
    """The tokens of one sequence, as its edits need them. Counts only what an edit asked for before the first token.

    Args:
        ending_ids: tokens that end the text.
    """

    def __init__(self, prompt_ids: tuple[int, ...], ending_ids: frozenset[int]) -> None:
        self.generated = 0
        self.ending = np.fromiter(ending_ids, dtype=np.int64)
        self._prompt_ids = prompt_ids
        self._counts: list[TokenCounts] = []

    def count(self, with_prompt: bool) -> TokenCounts:
        """The counts of the text's tokens from now on; those of the prompt are there, too, each with a count of 0."""
        prompt = np.unique(np.asarray(self._prompt_ids, dtype=np.int64)) if with_prompt else _NOTHING
        self._counts.append(TokenCounts(prompt))
        return self._counts[-1]

    def add(self, token: int) -> None:
        """Enters a new token."""
        self.generated += 1
        for counts in self._counts:
            counts.add(token)
