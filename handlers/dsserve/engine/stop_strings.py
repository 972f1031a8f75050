"""Strings that end a text, found while it grows: each character of the text is looked at once for each string.

The time and the memory grow with the text, not with the strings: of a string only the part is prepared that the text
has matched (Knuth, Morris and Pratt's borders, made as they are needed). Does not decode tokens (`detokenizer`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopString:
    """One string, and how much of it the text ends with.

    Attributes:
        matched: length of the longest end of the text that begins the string.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._borders = [0]  # of the string's first 1, 2, ... characters: their longest end that also begins them

    def find(self, text: str) -> int | None:
        """Takes more text; returns the place behind the character of it that completes the string, None before."""
        string, matched, at = self.string, self.matched, 0
        while matched < len(string):
            if not matched:
                at = text.find(string[0], at)
            if not 0 <= at < len(text):
                self.matched = matched
                return None
            while matched and string[matched] != text[at]:
                matched = self._border(matched)
            matched += string[matched] == text[at]
            at += 1
        self.matched = matched
        return at

    def _border(self, length: int) -> int:
        """The longest end of the string's first `length` characters that begins the string and is shorter."""
        string, borders = self.string, self._borders
        while len(borders) < length:
            character, border = string[len(borders)], borders[-1]
            while border and string[border] != character:
                border = borders[border - 1]
            borders.append(border + (string[border] == character))
        return borders[length - 1]


class StopStrings:
    """Holds back what may be the beginning of one of these strings until it is none.

    Attributes:
        found: one of them was complete; what came after it is lost.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = [StopString(string) for string in strings]
        self._held: deque[str] = deque()  # pieces, so that long ones are not copied for each token
        self._length = 0  # of all of them

    def push(self, text: str) -> str:
        """Takes more text and returns all that can no longer belong to a string; after the first one that is complete,
        wherever pieces end, all before it."""
        # Of those that are complete at the same place the longest counts, which begins first.
        ends = [
            (end, end - len(each.string)) for each in self._strings if (end := each.find(text)) is not None
        ]  # places in this text; one that is negative lies in what is held
        held = self._length
        self._held.append(text)
        self._length += len(text)
        if ends:
            self.found = True
            return self._take(held + min(ends)[1])
        return self._take(self._length - max(each.matched for each in self._strings))

    def flush(self) -> str:
        """The rest, at the end of the text."""
        return "" if self.found else self._take(self._length)

    def _take(self, count: int) -> str:
        """The first characters of what is held."""
        self._length -= count
        taken: list[str] = []
        while count:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
                piece = piece[:count]
            taken.append(piece)
            count -= len(piece)
        return "".join(taken)
