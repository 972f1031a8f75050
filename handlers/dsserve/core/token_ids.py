"""Token ids of one sequence as one array that grows with it, so that nobody copies a text to compare it."""

from __future__ import annotations

import numpy as np

_ROOM = 64


class TokenIds:
    """Ids in the order in which they came."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._ids = np.empty(len(tokens) + _ROOM, dtype=np.int64)
        self._ids[: len(tokens)] = tokens
        self._count = len(tokens)

    def __len__(self) -> int:
        return self._count

    def extend(self, tokens: list[int]) -> None:
        """Appends ids; each is copied a few times at most, however often this is called."""
        count = self._count + len(tokens)
        if count > len(self._ids):
            grown = np.empty(2 * count, dtype=np.int64)
            grown[: self._count] = self._ids[: self._count]
            self._ids = grown
        self._ids[self._count : count] = tokens
        self._count = count

    def first(self, count: int) -> np.ndarray:
        """The first so many ids, `[count]`, int64; not a copy."""
        return self._ids[:count]
