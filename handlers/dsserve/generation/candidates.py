"""The tokens that top_k, top_p, min_p and typical_p leave, found among the likeliest ones instead of the whole
vocabulary.

transformers' processors sort the vocabulary for each row (3 ms for 49,152 tokens on one core); here the likeliest
tokens are found without a sort, the rules are applied to them, and where a rule may reach beyond them, the row is
sorted whole. The result is that of transformers' processors in transformers' order: top_k, top_p, min_p, typical_p.
Temperature and edits come before (`sampler`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dsserve.generation.request import SamplingParams

# The likeliest tokens of a row that the rules look at first.
FIRST = 128
_BLOCK = 64


@dataclass(frozen=True)
class Candidates:
    """The tokens of one row that may be drawn: ids `[k]`, ascending, and their probabilities, fp64, sum 1."""

    ids: np.ndarray
    probabilities: np.ndarray

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
    rows, width = logits.shape
    if width < 4 * count * _BLOCK:
        return logits.topk(min(count, width), dim=-1)
    padded = torch.nn.functional.pad(logits, (0, -width % _BLOCK), value=float("-inf")) if width % _BLOCK else logits
    blocks = padded.view(rows, -1, _BLOCK)
    chosen = blocks.amax(dim=-1).topk(count, dim=-1).indices  # [n, count]
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)  # [n, count * _BLOCK]
    values, at = inside.topk(count, dim=-1)
    ids = chosen.gather(1, at // _BLOCK) * _BLOCK + at % _BLOCK
    return values, ids


def find_candidates(logits: torch.Tensor, rows: list[SamplingParams]) -> list[Candidates]:
    """What may be drawn in each row of `logits` `[n, V]`, fp32, after temperature and edits."""
    values, ids = find_top(logits, FIRST)
    # Only a sum over the whole vocabulary says how much of it the first candidates are.
    needs_total = any(params.top_p is not None and params.top_k is None for params in rows)
    totals = (logits - values[:, :1]).exp_().sum(dim=-1).tolist() if needs_total else [math.inf] * len(rows)
    is_whole = values.shape[1] == logits.shape[1]
    host_values, host_ids = values.double().cpu().numpy(), ids.cpu().numpy()
    found = []
    for row, params in enumerate(rows):
        candidates = _keep(host_values[row], host_ids[row], params, is_whole, totals[row])
        found.append(candidates or _keep_of_all(logits[row], params))
    return found


def _keep_of_all(logits: torch.Tensor, params: SamplingParams) -> Candidates:
    values, ids = logits.sort(descending=True)
    candidates = _keep(values.double().cpu().numpy(), ids.cpu().numpy(), params, True, math.inf)
    assert candidates is not None, "the whole vocabulary leaves nothing beyond it"
    return candidates


def _keep(
    values: np.ndarray, ids: np.ndarray, params: SamplingParams, is_whole: bool, total: float
) -> Candidates | None:
    """Applies the rules to a row's largest logits `[k]`, descending.

    Args:
        is_whole: the values are the whole vocabulary.
        total: sum of exp(logit - largest) over the vocabulary; needed for top_p without top_k.

    Returns:
        None where a token beyond the values might be kept too.
    """
    values = values - values[0]
    weights = np.exp(values)
    keep = np.ones(len(values), dtype=bool)
    bounded = is_whole
    if params.top_k is not None:
        keep = values >= values[min(params.top_k, len(values)) - 1]  # equals of the last one stay, as in transformers
        bounded = bounded or not keep[-1]
        if not bounded:
            return None
    if params.top_p is not None and params.top_p < 1:
        mass = weights[keep].sum() if bounded else total
        keep &= np.cumsum(weights) - weights < params.top_p * mass
        keep[0] = True
        bounded = bounded or not keep[-1]
    if params.min_p:
        keep &= weights >= params.min_p
        bounded = bounded or not keep[-1]
    if not bounded:
        return None
    if params.typical_p is not None and params.typical_p < 1:
        keep[keep] = _typical(weights[keep], params.typical_p)
    order = np.argsort(ids[keep])
    kept = weights[keep][order]
    return Candidates(ids[keep][order], kept / kept.sum())


def _typical(weights: np.ndarray, mass: float) -> np.ndarray:
    """Which tokens are nearest to the distribution's entropy, up to `mass` (Meister et al. 2022)."""
    probabilities = weights / weights.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = -np.log(probabilities)
        entropy = np.nansum(probabilities * information)
    distance = np.abs(information - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(probabilities[order]) < mass).sum()), len(order) - 1)
    return distance <= distance[order[last]]
