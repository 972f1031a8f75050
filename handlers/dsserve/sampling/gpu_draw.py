"""The next token of each row as operations of tensors alone: greedy, drawn from all tokens, or from what rules leave.

What `filters` and `sampler` do with numpy, row by row and in the same order, for a device that must not wait for the
host: no shape depends on a value, no value leaves the device, so that a CUDA graph can hold it. Covers the likeliest
`FIRST` tokens; a row whose rules may reach beyond them, whose logits are no numbers, or in which rounding could decide
otherwise than numpy's gets no token here, but -1. Edits of logits come before.
"""

from __future__ import annotations

import torch

from dsserve.core.request import SamplingParams
from dsserve.sampling.filters import FIRST, Rules, find_top, has_rules
from dsserve.sampling.inverse_cdf import find_places, sum_blocks, weigh
from dsserve.sampling.temperature import GREEDY_BELOW, clipped, scaled

_GREEDY, _FREE, _RULED = 0.0, 1.0, 2.0
# Numbers of a row, fp64: its kind, temperature, top_k, top_p, min_p, typical_p, and where a rule is off the value that
# keeps everything. `draw` takes a uniform number before them.
ROW_NUMBERS = 6
# Comparisons of fp64 sums closer than this are left to the host: exp, log and the order of sums round differently on a
# device, by less than 1e-13.
_CLOSE = 1e-11


def row_numbers(params: SamplingParams) -> tuple[float, ...]:
    """The `ROW_NUMBERS` of one row."""
    kind = _GREEDY if params.temperature < GREEDY_BELOW else _RULED if has_rules(params) else _FREE
    rules = Rules.of([params])
    columns = (rules.top_k, rules.top_p, rules.min_p, rules.typical_p)
    return (kind, clipped(params.temperature), *(float(column[0]) for column in columns))


def may_find(params: SamplingParams) -> bool:
    """Whether `draw` finds the tokens of such a row, but for rare ones: it never sees more than `FIRST` candidates."""
    return params.temperature < GREEDY_BELOW or params.top_k is None or params.top_k < FIRST


def is_ruled(numbers: tuple[float, ...]) -> bool:
    """Whether a row with these `row_numbers` needs `draw`'s rules."""
    return numbers[0] == _RULED


def draw(logits: torch.Tensor, numbers: torch.Tensor, with_rules: bool = True) -> torch.Tensor:
    """The next tokens `[n]`, int64; -1 where the host must choose.

    Args:
        logits: `[n, V]`, fp32, edited; stay as they are.
        numbers: `[n, 1 + ROW_NUMBERS]`, fp64.
        with_rules: False leaves out what only rows with rules need, where there are none: four fifths of the work.
    """
    uniforms, kinds, temperatures, *limits = numbers[:, :, None].unbind(dim=1)  # [n, 1] each
    largest, likeliest = logits.max(dim=-1, keepdim=True)  # the first of equals, as argmax has it
    rows, largest = scaled(logits, temperatures, largest)
    weights = weigh(rows, largest)
    cumulative = sum_blocks(weights).cumsum(dim=-1)  # [n, B]
    total = cumulative[:, -1:]
    drawn = find_places(weights, cumulative, uniforms)
    if with_rules:
        drawn = torch.where(kinds == _RULED, _draw_with_rules(rows, total, uniforms, limits), drawn)
    chosen = torch.where(kinds == _GREEDY, likeliest, drawn)
    return chosen.masked_fill_((total < torch.inf).logical_not_(), -1)[:, 0]


def _draw_with_rules(
    rows: torch.Tensor, total: torch.Tensor, uniforms: torch.Tensor, limits: list[torch.Tensor]
) -> torch.Tensor:
    """`filters.find_candidates` and `Candidates.draw` for rows `[n, V]` over temperature: tokens or -1, `[n, 1]`.

    Args:
        total: `[n, 1]`, fp64, sum of exp(logit - largest) over the vocabulary.
        limits: top_k, top_p, min_p, typical_p, `[n, 1]` each.
    """
    values, ids = find_top(rows, FIRST)
    weights = (values - values[:, :1].double()).exp_()  # [n, k], fp64
    keep, bounded, close = _apply(values, weights, values.shape[1] == rows.shape[1], total, limits)
    typical, also_close = _typical(values, weights * keep, limits[3])
    weights *= keep & typical
    tokens, place_close = _find_places(ids, weights, uniforms)
    close |= also_close | place_close
    return tokens.masked_fill_(close.any(dim=-1, keepdim=True) | bounded.logical_not(), -1)


def _apply(
    values: torch.Tensor, weights: torch.Tensor, is_whole: bool, total: torch.Tensor, limits: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`filters._apply` without typical_p, step for step, on the largest logits `[n, k]`, descending.

    Args:
        weights: exp(logit - largest), fp64.
        is_whole: the values are the whole vocabulary.

    Returns:
        What is kept `[n, k]`, whether nothing beyond the values can be `[n, 1]`, and what was close `[n, k]`.
    """
    top_k, top_p, min_p, _ = limits
    # A graph's spare rows may hold anything, and an index out of bounds ends the process.
    last = top_k.clamp(1, values.shape[1]).long() - 1
    keep = values >= values.gather(1, last)  # equals of the last one stay
    bounded = keep[:, -1:].logical_not() | is_whole
    mass = torch.where(bounded, (weights * keep).sum(dim=-1, keepdim=True), total)
    before, limit = weights.cumsum(dim=-1) - weights, top_p * mass
    keep &= before < limit
    keep[:, 0].fill_(True)
    keep &= weights >= min_p
    close = _are_close(before, limit, _CLOSE * mass) | _are_close(weights, min_p, _CLOSE * min_p)
    return keep, bounded | (keep[:, -1:].logical_not() & (top_k == torch.inf)), close


def _typical(values: torch.Tensor, weights: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are nearest to the distribution's entropy, up to a mass `[n, 1]`, and which were close, `[n, k]`.

    `filters._typical`; an infinite mass keeps all. Tokens of equal values are equally near on every device; only
    others can change places.
    """
    probabilities = weights / weights.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    distance = (probabilities.log() + entropy).abs_()  # infinite for what is not kept
    ordered, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(dim=-1)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp_(max=values.shape[1] - 1)
    farthest = ordered.gather(1, last)
    others = values != values.gather(1, order.gather(1, last))
    close = _are_close(distance, farthest, _CLOSE) & others
    return distance <= farthest, close | _are_close(reached, mass, _CLOSE)


def _find_places(ids: torch.Tensor, weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`Candidates.draw`: the token `[n, 1]` of ids `[n, k]` at a place of the cumulative distribution in the order of
    ids, and the sums that were close to it. Tokens that are not kept weigh nothing, and no place lies in them."""
    ids, order = ids.sort(dim=-1)
    cumulative = weights.gather(1, order).cumsum(dim=-1)
    total = cumulative[:, -1:]
    at = uniforms * total
    place = (cumulative <= at).sum(dim=-1, keepdim=True).clamp_(max=ids.shape[1] - 1)
    return ids.gather(1, place), _are_close(cumulative, at, _CLOSE * total)


def _are_close(left: torch.Tensor, right: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    return (left - right).abs_() < margin
