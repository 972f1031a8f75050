"""The pages of the KV cache: which are free, how many texts hold each, which hold tokens that may come again.

A page (the field's block) whose texts have ended keeps its keys and values until it is needed: it can be found by its
hash, and the least recently used one goes first. Rank 0's book alone; knows no tokens and no tensors.
"""

from __future__ import annotations

from collections import OrderedDict

# Padding is written here; no text ever holds it.
UNUSED = 0


class BlockPool:
    """Pages 1 to `size`; page 0 is nobody's.

    Args:
        size: pages that texts can hold.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * (size + 1)
        self._blank = list(range(size, 0, -1))  # the next one last: freshly freed ones are used again first
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # held by nobody, least recently used first
        self._hashes: dict[int, bytes] = {}  # page -> hash, of held and of cached ones
        self._pages: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._cached)

    def take(self) -> int | None:
        """A page for new tokens, held once; None where all are held."""
        if self._blank:
            page = self._blank.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more text holds a page that it found."""
        if not self._holders[page]:
            del self._cached[page]
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One text less holds it."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._hashes:
            self._cached[page] = self._hashes[page]
        else:
            self._blank.append(page)

    def find(self, digest: bytes) -> int | None:
        """The page that holds tokens with this hash."""
        return self._pages.get(digest)

    def is_held(self, page: int) -> bool:
        """Whether some text holds it."""
        return self._holders[page] > 0

    def name(self, page: int, digest: bytes) -> None:
        """Notes a held page's hash, unless another page has it."""
        if digest not in self._pages:
            self._pages[digest] = page
            self._hashes[page] = digest

    def forget(self, page: int) -> None:
        """A page's hash means nothing any more."""
        digest = self._hashes.pop(page, None)
        if digest is not None:
            del self._pages[digest]
