"""The largest reply that a request can have, in bytes: known when it is read, so that a reply too large is never made.

A token is reckoned as the longest one of the vocabulary, the likeliest tokens beside it as the longest ones after it.
Streams leave as they come and are not reckoned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from dsserve.core.errors import RequestError
from dsserve.protocol.bounds import LOGPROBS, REPLY_BYTES
from dsserve.protocol.openai.token_text import TokenText
from dsserve.protocol.reply import to_json

# A log probability in JSON, with the comma after it: -1.2345678901234567e-05.
_NUMBER = 24
_OFFSET = 10
# `"token":"","logprob":,"bytes":[]` and what joins it; `,"top_logprobs":[]` is the chosen token's alone.
_CHAT_ENTRY, _CHAT_TOP = 48, 24
_BETWEEN = 1  # some tokenizers write a space before each word
_CHOICE = 512  # the rest of an entry of `choices`
# What a model writes as a call's arguments is parsed and written again: `1e15,` becomes `1000000000000000.0, `.
CALL_FACTOR = 5


@dataclass(frozen=True)
class TokenSizes:
    """Bytes of JSON of a vocabulary's longest tokens.

    Attributes:
        text: of the longest one in a text.
        completion: `completion[k]`: of a log probability with the `k` likeliest tokens, in completions.
        chat: the same in chat.
    """

    text: int
    completion: tuple[int, ...]
    chat: tuple[int, ...]

    @classmethod
    def of(cls, token_text: TokenText, vocabulary: int) -> TokenSizes:
        """Measures every token."""
        most = LOGPROBS.most + 1
        texts, names, entries = [1], [0] * most, [0] * most  # a vocabulary may be small
        for token in range(vocabulary):
            value = token_text.read(token)
            text = value.decode(errors="replace")
            texts.append(_characters(text))
            names.append(_characters(token_text.name(value)) if "\ufffd" in text else texts[-1])
            entries.append(texts[-1] + 4 * len(value))
        longest = sorted(names, reverse=True)[:most]
        tops = [0, *itertools.accumulate(name + _NUMBER + 4 for name in longest)]
        completion = [longest[0] + 3 + _NUMBER + _OFFSET + top + 3 for top in tops[1:]]
        chat = itertools.accumulate(entry + _CHAT_ENTRY + _NUMBER for entry in [max(entries), *_longest(entries)])
        return cls(max(texts) + _BETWEEN, tuple(completion), tuple(size + _CHAT_TOP for size in chat))


def _longest(sizes: list[int]) -> list[int]:
    return sorted(sizes, reverse=True)[: LOGPROBS.most]


def _characters(text: str) -> int:
    """Bytes of a string in JSON, without its quotes."""
    if text.isprintable() and '"' not in text and "\\" not in text:  # as most are
        return len(text.encode())
    return len(to_json(text)) - 2


@dataclass(frozen=True)
class Texts:
    """Texts of one prompt in a reply.

    Attributes:
        count: how many.
        tokens: new ones of each at most.
        a_token: bytes of each of them.
        echoed: bytes that each begins with.
    """

    count: int
    tokens: int
    a_token: int
    echoed: int = 0

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.count * (self.echoed + self.tokens * self.a_token + _CHOICE)


def check_reply(texts: Iterable[Texts], param: str) -> None:
    """Checks the largest reply that is possible.

    Args:
        param: what the endpoint calls the number of new tokens.

    Raises:
        RequestError: 400; says the numbers and what to lower.
    """
    found = list(texts)
    size = sum(text.size for text in found)
    if size <= REPLY_BYTES.most:
        return
    largest = max(found, key=lambda text: text.size)
    echoed = f" after {largest.echoed} bytes of echo" if largest.echoed else ""
    raise RequestError(
        f"the reply may have {size} bytes, and at most {REPLY_BYTES.most} are sent at once: "
        f"{sum(text.count for text in found)} text(s) of up to {largest.tokens} tokens of up to {largest.a_token} "
        f"bytes{echoed}; lower {param}, n, logprobs or the number of prompts, or set stream: true",
        param=param,
    )


def echo_size(text: str) -> int:
    """Bytes of an echoed prompt."""
    return _characters(text)
