"""The tokens that top_k, top_p, min_p and typical_p leave, found among the likeliest ones instead of the whole
vocabulary.

transformers' processors sort the vocabulary for each row (3 ms for 49,152 tokens on one core); here the likeliest
tokens are found without a sort, the rules are applied to them, and where a rule may reach beyond them, the row is
sorted whole. The result is that of transformers' processors in transformers' order: top_k, top_p, min_p, typical_p.
Temperature and edits come before (`sampler`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsserve.core.request import SamplingParams
from dsserve.sampling.inverse_cdf import BLOCK, split, sum_blocks, weigh

# The likeliest tokens of a row that the rules look at first.
FIRST = 128
# More than any vocabulary has, and exact in fp64.
_MOST = 2**53


@dataclass(frozen=True)
class Candidates:
    """The tokens of one row that may be drawn: ids `[k]`, ascending, and their probabilities, fp64, sum 1.

    Empty where the logits are no numbers."""

    ids: np.ndarray
    probabilities: np.ndarray

    @property
    def is_empty(self) -> bool:
        return len(self.ids) == 0 or not np.isfinite(self.probabilities[0])

    def draw(self, uniform: float) -> int:
        """The token at `uniform` (0 to 1) of the cumulative distribution in the order of ids."""
        at = int(np.searchsorted(np.cumsum(self.probabilities), uniform, side="right"))
        return int(self.ids[min(at, len(self.ids) - 1)])


def has_rules(params: SamplingParams) -> bool:
    """Whether a request restricts the vocabulary at all."""
    return any(rule is not None for rule in (params.top_k, params.top_p, params.min_p, params.typical_p))


def find_top(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, descending, and their ids, both `[n, count]`.

    They lie in the `count` blocks with the largest maxima, which leaves few values to sort: 4 times faster than
    `torch.topk` on a CPU (16 rows of 49,152).
    """
    if logits.shape[1] < 4 * count * BLOCK:
        return logits.topk(min(count, logits.shape[1]), dim=-1)
    blocks = split(logits, float("-inf"))
    chosen = blocks.amax(dim=-1).topk(count, dim=-1).indices  # [n, count]
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)  # [n, count * BLOCK]
    values, at = inside.topk(count, dim=-1)
    ids = chosen.gather(1, at // BLOCK) * BLOCK + at % BLOCK
    return values, ids


def find_candidates(logits: torch.Tensor, rows: list[SamplingParams]) -> list[Candidates]:
    """What may be drawn in each row of `logits` `[n, V]`, fp32, after temperature and edits."""
    values, ids = find_top(logits, FIRST)
    # Only a sum over the whole vocabulary says how much of it the first candidates are.
    needs_total = any(params.top_p is not None and params.top_k is None for params in rows)
    totals = np.full(len(rows), np.inf)
    if needs_total:
        totals = sum_blocks(weigh(logits, values[:, :1])).sum(dim=-1).cpu().numpy()
    is_whole = values.shape[1] == logits.shape[1]
    found = _apply(values.double().cpu().numpy(), ids.cpu().numpy(), Rules.of(rows), is_whole, totals)
    return [one or _apply_to_all(logits[row], rows[row]) for row, one in enumerate(found)]


def _apply_to_all(logits: torch.Tensor, params: SamplingParams) -> Candidates:
    values, ids = logits[None].sort(descending=True)
    (found,) = _apply(values.double().cpu().numpy(), ids.cpu().numpy(), Rules.of([params]), True, np.full(1, np.inf))
    assert found is not None, "nothing lies beyond the whole vocabulary"
    return found


@dataclass(frozen=True)
class Rules:
    """The rules of several rows, `[n]` each; a rule that is off has a value that keeps everything."""

    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    typical_p: np.ndarray

    @classmethod
    def of(cls, rows: list[SamplingParams]) -> Rules:
        def column(name: str, lowest: float, highest: float, off: float) -> np.ndarray:
            """Clipped: a number of Python's may be larger than any array's."""
            values = [getattr(row, name) for row in rows]
            return np.array([off if value is None else min(max(value, lowest), highest) for value in values], float)

        top_p, typical_p = column("top_p", 0.0, 1.0, 1.0), column("typical_p", 0.0, 1.0, 1.0)
        top_p[top_p >= 1], typical_p[typical_p >= 1] = np.inf, np.inf
        return cls(column("top_k", 1, _MOST, np.inf), top_p, column("min_p", 0.0, 1.0, 0.0), typical_p)


def _apply(
    values: np.ndarray, ids: np.ndarray, rules: Rules, is_whole: bool, totals: np.ndarray
) -> list[Candidates | None]:
    """Applies the rules to the largest logits of each row, `[n, k]`, descending.

    Args:
        is_whole: the values are the whole vocabulary.
        totals: `[n]`, sum of exp(logit - largest) over the vocabulary, for rows with top_p and without top_k.

    Returns:
        None for a row where a token beyond the values might be kept too.
    """
    count = values.shape[1]
    with np.errstate(invalid="ignore"):  # an infinite logit makes its row empty
        weights = np.exp(values - values[:, :1])
    last = np.minimum(rules.top_k, count).astype(np.int64) - 1
    keep = values >= np.take_along_axis(values, last[:, None], 1)  # equals of the last one stay, as in transformers
    bounded = is_whole | ~keep[:, -1]
    lost = np.isfinite(rules.top_k) & ~bounded
    mass = np.where(bounded, (weights * keep).sum(axis=1), totals)
    keep &= np.cumsum(weights, axis=1) - weights < (rules.top_p * mass)[:, None]
    keep[:, 0] = True
    keep &= weights >= rules.min_p[:, None]
    bounded |= ~keep[:, -1]
    if np.isfinite(rules.typical_p).any():
        keep &= _typical(weights * keep, rules.typical_p)
    found: list[Candidates | None] = [None] * len(values)
    for row in np.flatnonzero(bounded & ~lost):
        kept = np.flatnonzero(keep[row] & (weights[row] > 0))  # rounding must not draw what is banned
        kept = kept[np.argsort(ids[row, kept])]
        probabilities = weights[row, kept]
        found[row] = Candidates(ids[row, kept], probabilities / probabilities.sum())
    return found


def _typical(weights: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Which tokens of each row `[n, k]` are nearest to the distribution's entropy, up to a mass (Meister 2022)."""
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = -np.log(probabilities)
        entropy = np.nansum(probabilities * information, axis=1, keepdims=True)
    distance = np.abs(information - entropy)  # infinite for what is not kept
    order = np.argsort(distance, axis=1, kind="stable")
    reached = np.cumsum(np.take_along_axis(probabilities, order, 1), axis=1) < mass[:, None]
    last = np.minimum(reached.sum(axis=1), weights.shape[1] - 1)
    farthest = np.take_along_axis(distance, np.take_along_axis(order, last[:, None], 1), 1)
    return distance <= farthest
