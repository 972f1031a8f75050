"""The text and the bytes of single tokens, for log probabilities. Whole texts are `engine.detokenizer`'s."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Knows byte-level tokenizers (GPT-2's alphabet of bytes) and sentencepiece ones (`▁`, `<0x0A>`)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._specials = set(tokenizer.all_special_tokens)
        self._is_byte_level = _is_byte_level(tokenizer)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; of a character's part these are no UTF-8."""
        if token not in self._known:
            self._known[token] = self.read(token)
        return self._known[token]

    def read(self, token: int) -> bytes:
        """As `bytes_of`, for who asks once for every token."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if piece in self._specials:
            return piece.encode()
        if self._is_byte_level:
            alphabet = _alphabet()
            return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """A token's text; bytes that are no UTF-8 as OpenAI writes them: `bytes:\\xf0\\x9f`."""
        return self.name(self.bytes_of(token))

    @staticmethod
    def name(value: bytes) -> str:
        """As `text_of`, of a token's bytes."""
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in str(backend.decoder)


@cache
def _alphabet() -> dict[str, int]:
    """Character -> byte: printable bytes stand for themselves, the others for characters from 256 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
