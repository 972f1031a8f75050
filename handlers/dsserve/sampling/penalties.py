"""What a request changes in its logits before a token is drawn: bias, penalties, banned tokens, a grammar's mask.

The field calls these logits processors. Each is one row of `EDITS` and they apply in its order, that of transformers'
`generate`: bias, repetition penalty, then OpenAI's two penalties, which transformers lacks, then bans. A step's edits
of all rows are applied together: a few operations, however many rows. Does not draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsserve.core.request import SamplingParams
from dsserve.sampling.grammar import GrammarError
from dsserve.sampling.token_history import TokenHistory

_NOTHING = np.zeros(0, dtype=np.float32)
_NOBODY = np.zeros(0, dtype=np.int64)
_OFF = SamplingParams()

# Token ids whose logits change, `[n]`, int64, and a number for each, `[n]`, fp32, or none.
Places = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Edit:
    """One row: parameters of `SamplingParams`, off at their defaults, and what they do.

    Attributes:
        start: begins a sequence on the host; what it returns is asked for the places of each step.
        apply: changes the logits of all rows, `[n * V]`, on their device: at places `[m]`, by numbers `[m]` or `[0]`.
        steps: how many new tokens the edit is for.
    """

    names: tuple[str, ...]
    start: Callable[[SamplingParams, TokenHistory], Callable[[], Places]]
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
    steps: Callable[[SamplingParams], float] = lambda params: math.inf

    def is_on(self, params: SamplingParams) -> bool:
        """Whether a request asks for it."""
        return any(getattr(params, name) != getattr(_OFF, name) for name in self.names)


def _bias(params: SamplingParams, history: TokenHistory) -> Callable[[], Places]:
    ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
    numbers = np.fromiter(params.logit_bias.values(), dtype=np.float32)
    return lambda: (ids, numbers)


def _add(flat: torch.Tensor, at: torch.Tensor, by: torch.Tensor) -> None:
    flat.index_add_(0, at, by)


def _repetition(params: SamplingParams, history: TokenHistory) -> Callable[[], Places]:
    """Each token of prompt and text once."""
    seen = history.count(with_prompt=True)
    return lambda: (seen.ids, np.full(len(seen.ids), params.repetition_penalty, dtype=np.float32))


def _divide(flat: torch.Tensor, at: torch.Tensor, by: torch.Tensor) -> None:
    found = flat[at]
    flat[at] = torch.where(found < 0, found * by, found / by)


def _presence_and_frequency(params: SamplingParams, history: TokenHistory) -> Callable[[], Places]:
    """One edit: taken off one after the other, the two would round otherwise."""
    counts = history.count(with_prompt=False)
    return lambda: (counts.ids, -(params.presence_penalty + params.frequency_penalty * counts.times))


def _endings(params: SamplingParams, history: TokenHistory) -> Callable[[], Places]:
    """What ends the text must not come next until there are enough tokens."""
    return lambda: (history.ending if history.generated < params.min_tokens else _NOBODY, _NOTHING)


def _ban(flat: torch.Tensor, at: torch.Tensor, _: torch.Tensor) -> None:
    flat.index_fill_(0, at, -torch.inf)


EDITS = (
    Edit(("logit_bias",), _bias, _add),
    Edit(("repetition_penalty",), _repetition, _divide),
    Edit(("presence_penalty", "frequency_penalty"), _presence_and_frequency, _add),
    Edit(("min_tokens",), _endings, _ban, lambda params: params.min_tokens),
)


class RowEdits:
    """The edits of one sequence.

    Args:
        prompt_ids: count for the repetition penalty alone.
        ending_ids: tokens that end the text, banned until there are `min_tokens` new ones.
    """

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...], ending_ids: frozenset[int]) -> None:
        self._history = TokenHistory(prompt_ids, ending_ids)
        on = [edit for edit in EDITS if edit.is_on(params)]
        self.places = {edit: edit.start(params, self._history) for edit in on}
        self._steps = max((edit.steps(params) for edit in on), default=0)

    @property
    def is_plain(self) -> bool:
        """Whether the next token's logits stay as they are, and so do all after it."""
        return self._history.generated >= self._steps

    def add(self, token: int) -> None:
        """Enters a new token."""
        self._history.add(token)


def edit_logits(logits: torch.Tensor, rows: list[RowEdits]) -> None:
    """Applies the edits of each row, in place. `logits` is `[n, V]`, fp32, contiguous."""
    flat = logits.view(-1)
    found = {edit: _Places(logits.shape[1]) for edit in EDITS}
    for row, edits in enumerate(rows):
        if not edits.is_plain:
            for edit, places in edits.places.items():
                found[edit].add(row, *places())
    used = {edit: places.arrays() for edit, places in found.items() if places}
    if not used:
        return
    tensors = to_device([part for places in used.values() for part in places], logits.device)
    for edit, at, by in zip(used, tensors[::2], tensors[1::2], strict=True):
        if len(at):
            edit.apply(flat, at, by)


class _Places:
    """Places in rows of so many tokens, and a number for each. Ids that no token of the row has are left out: in the
    flat tensor they would be another row's, or none."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._parts: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, row: int, ids: np.ndarray, values: np.ndarray) -> None:
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
