"""The uniform numbers of one sequence: its seed, its index in the request and its position alone decide them."""

from __future__ import annotations

import secrets
from functools import cached_property

import numpy as np

_DRAWN_AT_ONCE = 64


class Uniforms:
    """Numbers in [0, 1), one for each position of sequence `index` of a request, without end. Philox, counter-based.

    Args:
        seed: None = one that nobody knows.
    """

    def __init__(self, seed: int | None, index: int) -> None:
        self._seed, self._index = seed, index
        self._ready: list[float] = []  # the next one last

    def __iter__(self) -> Uniforms:
        return self

    def __next__(self) -> float:
        if not self._ready:
            self._ready = self._generator.random(_DRAWN_AT_ONCE).tolist()[::-1]
        return self._ready.pop()

    @cached_property
    def _generator(self) -> np.random.Generator:
        """Made when it is first drawn from: greedy sequences, which need none, begin faster."""
        seed = secrets.randbits(63) if self._seed is None else self._seed
        return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, self._index], dtype=np.uint64)))

    def put_back(self, number: float) -> None:
        """Makes the number that was taken last the next one again."""
        self._ready.append(number)
