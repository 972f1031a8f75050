"""The next token of each row as operations of tensors alone: greedy, drawn from all tokens, or from what rules leave.

What `filters` and `sampler` do with numpy, row by row and in the same order, for a device that must not wait for the
host: no shape depends on a value, no value leaves the device, so that a CUDA graph can hold it. Covers the likeliest
`FIRST` tokens; a row whose rules may reach beyond them, whose logits are no numbers, or in which rounding could decide
otherwise than numpy's gets no token here, but -1. Edits of logits come before.
"""

from __future__ import annotations

import torch

from dsserve.core.request import SamplingParams
from dsserve.sampling.filters import FIRST, find_top
from dsserve.sampling.inverse_cdf import find_places, sum_blocks, weigh
from dsserve.sampling.rules import CLOSE, RULES, Likeliest, are_close, has_rules, limits_of, may_end_within
from dsserve.sampling.temperature import GREEDY_BELOW, clipped, scaled

_GREEDY, _FREE, _RULED = 0.0, 1.0, 2.0
# Numbers of a row, fp64: its kind, temperature, and the limit of each rule. `draw` takes a uniform number before them.
ROW_NUMBERS = 2 + len(RULES)


def row_numbers(params: SamplingParams) -> tuple[float, ...]:
    """The `ROW_NUMBERS` of one row."""
    kind = _GREEDY if params.temperature < GREEDY_BELOW else _RULED if has_rules(params) else _FREE
    return (kind, clipped(params.temperature), *limits_of(params))


def may_find(params: SamplingParams) -> bool:
    """Whether `draw` finds the tokens of such a row, but for rare ones: it never sees more than `FIRST` candidates."""
    return params.temperature < GREEDY_BELOW or may_end_within(params, FIRST)


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
    logits: torch.Tensor, total: torch.Tensor, uniforms: torch.Tensor, limits: list[torch.Tensor]
) -> torch.Tensor:
    """`filters.find_candidates` and `Candidates.draw` for rows `[n, V]` over temperature: tokens or -1, `[n, 1]`.

    Args:
        total: `[n, 1]`, fp64, sum of exp(logit - largest) over the vocabulary.
        limits: of each rule, `[n, 1]`.
    """
    values, ids = find_top(logits, FIRST)
    weights = (values - values[:, :1].double()).exp_()  # [n, k], fp64
    keep, lost = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(total, dtype=torch.bool)
    rows = Likeliest(values, weights, values.shape[1] == logits.shape[1], lambda: total, keep, lost)
    for rule, limit in zip(RULES, limits, strict=True):
        rule.device(rows, limit)
    tokens, close = _find_places(ids, weights * rows.keep, uniforms)
    for one in rows.close:
        close |= one
    return tokens.masked_fill_(close.any(dim=-1, keepdim=True) | rows.lost | rows.open, -1)


def _find_places(ids: torch.Tensor, weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`Candidates.draw`: the token `[n, 1]` of ids `[n, k]` at a place of the cumulative distribution in the order of
    ids, and the sums that were close to it. Tokens that are not kept weigh nothing, and no place lies in them."""
    ids, order = ids.sort(dim=-1)
    cumulative = weights.gather(1, order).cumsum(dim=-1)
    total = cumulative[:, -1:]
    at = uniforms * total
    place = (cumulative <= at).sum(dim=-1, keepdim=True).clamp_(max=ids.shape[1] - 1)
    return ids.gather(1, place), are_close(cumulative, at, CLOSE * total)
