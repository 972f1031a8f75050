"""The sequences that wait for a row: those of a lower priority number first, then in the order of arrival."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from dsserve.engine.sequence import Sequence


class WaitingQueue:
    """Whoever comes gets a place for good: one that is put back stands where it stood."""

    def __init__(self) -> None:
        self._texts: list[Sequence] = []
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(tuple(self._texts))

    @property
    def first(self) -> Sequence:
        """The one whose turn it is."""
        return self._texts[0]

    def add(self, text: Sequence) -> None:
        """A new sequence waits."""
        self._arrived += 1
        text.place = (text.request.priority, self._arrived)
        self.put_back(text)

    def put_back(self, text: Sequence) -> None:
        """A sequence waits again."""
        insort(self._texts, text, key=place)

    def remove(self, text: Sequence) -> None:
        """A sequence waits no longer."""
        self._texts.remove(text)

    def take(self, request_id: str) -> list[Sequence]:
        """A request's sequences, which wait no longer."""
        found = [text for text in self._texts if text.request.request_id == request_id]
        if found:
            self._texts = [text for text in self._texts if text.request.request_id != request_id]
        return found


def place(text: Sequence) -> tuple[int, int]:
    """A lower one comes first, and is put back last."""
    return text.place
