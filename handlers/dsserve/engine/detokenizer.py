"""Token ids to text, piece by piece: whole characters only, and nothing of a stop string.

A tokenizer's pieces cannot be decoded one by one: a character may span several tokens, and sentencepiece drops the
space before the first one. So a short window is decoded twice, without and with the new tokens, and the difference is
the new text (the way of TGI and vLLM). Does not decide when a text ends by length or end-of-text token (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsserve.engine.stop_strings import StopStrings

_REPLACEMENT = "\ufffd"
# A character of UTF-8 has at most 4 bytes: more tokens that still end in U+FFFD hold broken bytes for good.
_MAX_PENDING = 8
# Of more tokens without text (a client can ask for end-of-text tokens for ever) the first and the last ones are kept.
_MAX_SILENT = 32


class TextStream:
    """The text of one request while it grows. `push` costs the same for the first and the last token, `extend` not
    much more for many.

    Args:
        tokenizer: a transformers tokenizer; special tokens give no text.
        stop: strings that end the text; they and what follows are cut.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = StopStrings(stop) if stop else None
        self._window: list[int] = []  # decoded together; the first `_read` of them have given their text already
        self._read = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stop is not None and self._stop.found

    def push(self, token: int, may_stop: bool = True) -> str:
        """Takes the next token and returns the text that is safe to send, often none.

        Sets `stopped` once a stop string is complete; the text returned then ends before it. Text that comes before
        the text may stop is sent whatever it holds.
        """
        self._window.append(token)
        before, whole = self._decode(self._window[: self._read]), self._decode(self._window)
        pending = len(self._window) - self._read
        if whole.endswith(_REPLACEMENT) and pending < _MAX_PENDING:
            return ""
        text = whole[len(before) :]
        if text:  # tokens without text (special ones) stay in the window: nothing may follow them as a first word
            self._window = self._window[self._read :]
        elif len(self._window) > _MAX_SILENT:
            self._window = self._window[:_MAX_PENDING] + self._window[-_MAX_PENDING:]
        self._read = len(self._window)
        return self._release(text, may_stop)

    def extend(self, tokens: list[int]) -> str:
        """What `push` gives for each of these tokens, together, at the price of two where that is possible. For texts
        without stop strings."""
        if len(tokens) > 2:
            ends = [self._read, *(len(self._window) + len(tokens) - left for left in (2, 1, 0))]
            before, early, late, whole = (self._decode([*self._window, *tokens][:end]) for end in ends)
            grows = whole.startswith(late) and late.startswith(early) and early.startswith(before)
            # Each of the last two tokens gives text, and no character is broken: `push` would hold the last one alone.
            if grows and len(whole) > len(late) > len(early) and _REPLACEMENT not in whole:
                self._window, self._read = tokens[-1:], 1
                return whole[len(before) :]
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        """The rest at the end of the text, incomplete characters as U+FFFD."""
        text = self._decode(self._window)[len(self._decode(self._window[: self._read])) :]
        self._window, self._read = [], 0
        return self._release(text) + (self._stop.flush() if self._stop else "")

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str, may_stop: bool = True) -> str:
        """What of `text`, and of what was held before, can no longer belong to a stop string."""
        return self._stop.push(text) if self._stop and may_stop else text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, shorter than `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
