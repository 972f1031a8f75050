"""Which pages hold the keys and values of which text: rank 0's book. A text holds what it has, not what it may have.

Full pages are named by a hash of their tokens and of all before them (chained, salted), so that a text that begins like
another one holds the same pages: nothing is copied, and nothing is computed again (prefix caching). Does not choose
texts (`engine.scheduler`) and knows no tensors (`kv.store`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsserve.kv.block_pool import BlockPool

# (begin, end) -> the tokens of a text from the one position to before the other
Tokens = Callable[[int, int], Sequence[int]]

_DIGEST_BYTES = 16


@dataclass
class TextPages:
    """The pages of one text.

    Attributes:
        tokens: gives the text's tokens that are known.
        salt: texts with different salts share nothing.
        pages: in the order of the text.
        told: how many of them the ranks know.
        named: how many of them, full ones, are in the index.
        hashes: of the text's first full pages, as far as somebody asked.
    """

    tokens: Tokens
    salt: bytes = b""
    pages: list[int] = field(default_factory=list)
    told: int = 0
    named: int = 0
    hashes: list[bytes] = field(default_factory=list)


class KVManager:
    """The pages of all texts.

    Args:
        pages: their number.
        page_tokens: of one page.
        reuse: texts may begin with pages of others.
    """

    def __init__(self, pages: int, page_tokens: int, reuse: bool = True) -> None:
        self.page_tokens = page_tokens
        self._pool = BlockPool(pages)
        self._reuse = reuse
        self.releases = 0  # how often pages came free: whoever found too few need not look again before

    @property
    def tokens(self) -> int:
        """How many tokens' keys and values all pages hold."""
        return self._pool.size * self.page_tokens

    @property
    def usage(self) -> float:
        """Share of the pages that texts hold, 0 to 1."""
        return 1 - self._pool.free / self._pool.size if self._pool.size else 1.0

    @property
    def free_pages(self) -> int:
        """Pages that no text holds."""
        return self._pool.free

    def pages_for(self, tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-tokens // self.page_tokens)

    def match(self, text: TextPages, length: int) -> list[int]:
        """The pages that hold the beginning of a text of `length` known tokens already, all but its last token at most;
        nobody holds them for it yet."""
        found: list[int] = []
        if not self._reuse:
            return found
        for number in range((length - 1) // self.page_tokens):
            page = self._pool.find(self._hash(text, number))
            if page is None:
                break
            found.append(page)
        return found

    def new_pages(self, found: list[int], length: int) -> int:
        """How many free pages a text of `length` tokens takes that begins with `found`."""
        return self.pages_for(length) - sum(self._pool.is_held(page) for page in found)

    def begin(self, text: TextPages, found: list[int]) -> int:
        """A text without pages holds the found ones; returns their tokens."""
        for page in found:
            self._pool.share(page)
        text.pages = list(found)
        text.told, text.named = 0, len(found)
        return len(found) * self.page_tokens

    def grow(self, text: TextPages, length: int) -> bool:
        """Gives a text pages for `length` tokens; where there are too few it keeps those that it got."""
        while len(text.pages) * self.page_tokens < length:
            page = self._pool.take()
            if page is None:
                return False
            text.pages.append(page)
        return True

    def tell(self, text: TextPages) -> tuple[int, tuple[int, ...]]:
        """The text's pages that the ranks do not know: the place of the first one, and the pages."""
        told, text.told = text.told, len(text.pages)
        return told, tuple(text.pages[told:])

    def name(self, text: TextPages, length: int) -> None:
        """The first `length` tokens of a text are known, and are computed by now or in a step that was planned: others
        may begin with the full pages among them."""
        if not self._reuse:
            return
        for number in range(text.named, length // self.page_tokens):
            self._pool.name(text.pages[number], self._hash(text, number))
        text.named = max(text.named, length // self.page_tokens)

    def unname(self, text: TextPages, length: int) -> None:
        """Only the first `length` tokens were computed after all."""
        kept = length // self.page_tokens
        for page in text.pages[kept : text.named]:
            self._pool.forget(page)
        text.named, text.told = min(text.named, kept), 0

    def release(self, text: TextPages) -> None:
        """The text holds nothing any more. Its last pages are the first that others get."""
        for page in reversed(text.pages):
            self._pool.drop(page)
        text.pages, text.told, text.named = [], 0, 0
        self.releases += 1

    def _hash(self, text: TextPages, number: int) -> bytes:
        """Of a full page of the text and all before it."""
        hashes, size = text.hashes, self.page_tokens
        while len(hashes) <= number:
            at = len(hashes)
            before = hashes[-1] if hashes else hashlib.blake2b(text.salt, digest_size=_DIGEST_BYTES).digest()
            tokens = np.asarray(text.tokens(at * size, (at + 1) * size), dtype=np.int64).tobytes()
            hashes.append(hashlib.blake2b(before + tokens, digest_size=_DIGEST_BYTES).digest())
        return hashes[number]
