"""Which rows of the KV cache hold the beginning of a new prompt: rank 0's book of live rows and of kept ones.

A row whose request ended is copied to a kept row, the least recently used one. A new prompt that begins like a live or
kept row takes that part over by a copy (a prefix cache hit), and only the rest is computed. Knows tokens and row
numbers; the copies are `runner.autotp`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Shorter beginnings are computed again: a few tokens more in a pass cost less than a copy.
SHORTEST = 16
# Most prompts differ within so many tokens.
_COMPARED_FIRST = 64

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Hit:
    """A row that begins with a prompt's first `length` tokens."""

    row: int
    length: int


class PrefixCache:
    """Kept rows `first`, behind the slots, to `first + size - 1`; with size 0 nothing is shared, live rows neither."""

    def __init__(self, first: int, size: int) -> None:
        self.enabled = size > 0
        self._free = list(range(first, first + size))
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()  # row -> its tokens, least recently used first

    def keep(self, tokens: Tokens) -> int | None:
        """The row to copy an ended row with these tokens to; None where it is not worth it.

        A kept row that begins or continues these tokens is used again, so that turns of a conversation take one row.
        """
        if not self.enabled or len(tokens) < SHORTEST:
            return None
        new = np.array(tokens, dtype=np.int64)  # a copy: what a sequence gives is its own, and has room to grow
        for row, known in self._kept.items():
            shared = common_length(known, new)
            if shared == len(new):
                self._kept.move_to_end(row)
                return None
            if shared == len(known):
                return self._enter(row, new)
        row = self._free.pop() if self._free else next(iter(self._kept))
        return self._enter(row, new)

    def _enter(self, row: int, tokens: np.ndarray) -> int:
        self._kept[row] = tokens
        self._kept.move_to_end(row)
        return row

    def find(self, prompt: Tokens, live: Sequence[tuple[int, Tokens]]) -> Hit | None:
        """The row with the longest common beginning, at least `SHORTEST` and less than the whole prompt.

        Args:
            live: (row, its tokens whose keys and values are there) of each live row.
        """
        if not self.enabled or len(prompt) <= SHORTEST:
            return None
        wanted = np.asarray(prompt[:-1], dtype=np.int64)  # the last token's logits have to be computed
        rows = [(row, np.asarray(tokens, dtype=np.int64)) for row, tokens in live] + list(self._kept.items())
        best = max((Hit(row, common_length(tokens, wanted)) for row, tokens in rows), key=_length, default=None)
        if best is None or best.length < SHORTEST:
            return None
        if best.row in self._kept:
            self._kept.move_to_end(best.row)
        return best


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Number of equal tokens at the beginning of both; costs so much and no more, however long they are."""
    length = min(len(first), len(second))
    begun, size = 0, _COMPARED_FIRST
    while begun < length:
        end = min(begun + size, length)
        different = np.flatnonzero(first[begun:end] != second[begun:end])
        if len(different):
            return begun + int(different[0])
        begun, size = end, 4 * size
    return length


def _length(hit: Hit) -> int:
    return hit.length
