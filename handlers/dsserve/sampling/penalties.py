"""What a request changes in its logits before a token is drawn: bias, penalties, banned tokens, a grammar's mask.

The field calls these logits processors. They apply in the order of transformers' `generate`: bias, repetition penalty,
then OpenAI's two penalties, which transformers lacks, then bans. A step's edits of all rows are applied together: a few
operations, however many rows. Does not draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dsserve.sampling.grammar import GrammarError
from dsserve.sampling.token_history import TokenHistory

_NOTHING = np.zeros(0, dtype=np.float32)


def edit_logits(logits: torch.Tensor, histories: list[tuple[TokenHistory, float]]) -> None:
    """Applies the edits of each row, in place. `logits` is `[n, V]`, fp32, contiguous.

    Args:
        histories: of each row, with its repetition penalty.
    """
    flat, width = logits.view(-1), logits.shape[1]
    bias, repeated, penalized, banned = _Places(width), _Places(width), _Places(width), _Places(width)
    for row, (history, factor) in enumerate(histories):
        if history.is_plain:
            continue
        bias.add(row, *history.bias())
        ids = history.repeated()
        repeated.add(row, ids, np.full(len(ids), factor, dtype=np.float32))
        penalized.add(row, *history.penalties())
        banned.add(row, history.banned())
    if not banned:
        return
    parts = [*bias.arrays(), *repeated.arrays(), *penalized.arrays(), banned.arrays()[0]]
    bias_at, bias_by, repeated_at, factor_at, penalized_at, taken_by, banned_at = to_device(parts, logits.device)
    if len(bias_at):
        flat.index_add_(0, bias_at, bias_by)
    if len(repeated_at):
        found = flat[repeated_at]
        flat[repeated_at] = torch.where(found < 0, found * factor_at, found / factor_at)
    if len(penalized_at):
        flat.index_add_(0, penalized_at, -taken_by)
    if len(banned_at):
        flat.index_fill_(0, banned_at, float("-inf"))


class _Places:
    """Places in rows of so many tokens, and a number for each. Ids that no token of the row has are left out: in the
    flat tensor they would be another row's, or none."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._parts: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, row: int, ids: np.ndarray, values: np.ndarray = _NOTHING) -> None:
        """Token ids `[n]` of a row, with their numbers `[n]` if they have some."""
        self._parts.append((row, ids, values))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The places in the flat tensor, int64, and the numbers, fp32."""
        rows, ids, values = zip(*self._parts, strict=True)
        at, by = np.concatenate(ids), np.concatenate(values)
        is_within = (at >= 0) & (at < self._width)
        at = at + self._width * np.repeat(np.array(rows, dtype=np.int64), [len(part) for part in ids])
        return at[is_within], by[is_within] if len(by) else by


def to_device(parts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays of int64 and fp32 as tensors there: to a GPU in one copy that waits for nothing."""
    if device.type == "cpu":
        return [torch.from_numpy(part) for part in parts]
    return unpack(torch.from_numpy(pack(parts)).pin_memory().to(device, non_blocking=True), parts)


def pack(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays `[n_i]` of int64 and fp32 as one of int64: fp32 as the bits of fp64, which holds every fp32 number."""
    return np.concatenate([_bits(part) if part.dtype == np.float32 else part for part in parts])


def _bits(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float64).view(np.int64)


def unpack(packed: torch.Tensor, parts: list[np.ndarray]) -> list[torch.Tensor]:
    """What `pack` made of these arrays, as tensors of their lengths and dtypes."""
    pieces = packed.split([len(part) for part in parts])
    return [
        piece.view(torch.float64).float() if part.dtype == np.float32 else piece
        for piece, part in zip(pieces, parts, strict=True)
    ]


def mask_logits(row: torch.Tensor, grammar: Any) -> None:
    """Bans what a grammar does not allow next, in place. `row` is `[V]`; see `grammar.Grammar.allowed`.

    Raises:
        GrammarError: nothing is allowed, or the matcher gave up.
    """
    allowed = grammar.allowed(row.shape[0])
    if not allowed.any():
        raise GrammarError("no token may come next")
    row.masked_fill_(~torch.from_numpy(allowed).to(row.device), float("-inf"))
