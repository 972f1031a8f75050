"""The rules that narrow the vocabulary before a draw: each is one row of `RULES`, for the host and for a device.

The field calls these logits warpers. They apply in the order of the rows, which is transformers' own: top_k, top_p,
min_p, typical_p. The host's rule is numpy's, and its result is that of transformers' processors. The device's rule does
the same in torch, in shapes that depend on no value, so that a CUDA graph can hold it. Both see the likeliest tokens of
each row alone, and both change a `Likeliest`. Finding those tokens and drawing are `filters`' and `gpu_draw`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dsserve.core.request import SamplingParams

# More than any vocabulary has, and exact in fp64.
_MOST = 2**53
# Comparisons of fp64 sums closer than this are left to the host: exp, log and the order of sums round differently on a
# device, by less than 1e-13.
CLOSE = 1e-11


@dataclass
class Likeliest:
    """The likeliest tokens of some rows and what the rules so far keep of them: arrays of numpy, or torch's tensors.

    Attributes:
        values: the largest logits of each row, `[n, k]`, descending.
        weights: exp(logit - largest), `[n, k]`, fp64.
        is_whole: the values are the whole vocabulary.
        total: gives the sum of exp(logit - largest) over the vocabulary, `[n, 1]`, fp64.
        keep: what may be drawn, `[n, k]`.
        lost: rows in which a rule would need more than these tokens, `[n, 1]`.
        close: on a device, the comparisons that rounding might decide otherwise than on the host, `[n, k]` each.
    """

    values: Any
    weights: Any
    is_whole: bool
    total: Callable[[], Any]
    keep: Any
    lost: Any
    close: list[torch.Tensor] = field(default_factory=list)

    @property
    def open(self) -> Any:
        """Rows in which a token beyond these might be kept too, `[n, 1]`: what is kept reaches the last one."""
        reaches_last = self.keep[:, -1:]
        return reaches_last & False if self.is_whole else reaches_last

    def narrow(self, keep: Any) -> None:
        """Keeps the likeliest tokens: none after the first that is dropped."""
        self.keep &= keep

    def pick(self, keep: Any) -> None:
        """Keeps any of the tokens, chosen by a look at all that are kept so far."""
        self.lost |= self.open
        self.keep &= keep


Apply = Callable[[Likeliest, Any], None]


@dataclass(frozen=True)
class Rule:
    """One row: a parameter of `SamplingParams`, None where it is off, and what it does.

    Attributes:
        off: the limit that keeps everything.
        clip: makes a request's number a limit; Python's numbers may be larger than any array's.
        host: narrows numpy's rows to limits `[n, 1]`; left out where all rows are off.
        device: the same with tensors; notes what is `CLOSE`.
    """

    name: str
    off: float
    clip: Callable[[float], float]
    host: Apply
    device: Apply

    def limit(self, params: SamplingParams) -> float:
        """A request's limit."""
        wish = getattr(params, self.name)
        return self.off if wish is None else float(self.clip(wish))


def has_rules(params: SamplingParams) -> bool:
    """Whether a request restricts the vocabulary at all."""
    return any(getattr(params, rule.name) is not None for rule in RULES)


def limits_of(params: SamplingParams) -> tuple[float, ...]:
    """A request's limits, one for each rule."""
    return tuple(rule.limit(params) for rule in RULES)


def may_end_within(params: SamplingParams, count: int) -> bool:
    """Whether the rules may be decided by the `count` likeliest tokens."""
    return params.top_k is None or params.top_k < count


def are_close(left: torch.Tensor, right: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """Where two numbers differ by less than the margin."""
    return (left - right).abs_() < margin


def _share(wish: float) -> float:
    return min(max(wish, 0.0), 1.0)


def _mass(wish: float) -> float:
    """All of it is more than any sum, which rounding may make more than one."""
    return np.inf if wish >= 1 else max(wish, 0.0)


def _top_k(rows: Likeliest, limit: np.ndarray) -> None:
    """Equals of the last one stay, as in transformers."""
    last = np.minimum(limit, rows.values.shape[1]).astype(np.int64) - 1
    rows.narrow(rows.values >= np.take_along_axis(rows.values, last, 1))
    rows.lost |= np.isfinite(limit) & rows.open  # nobody knows the mass of what it keeps


def _top_k_on_device(rows: Likeliest, limit: torch.Tensor) -> None:
    # A graph's spare rows may hold anything, and an index out of bounds ends the process.
    last = limit.clamp(1, rows.values.shape[1]).long() - 1
    rows.narrow(rows.values >= rows.values.gather(1, last))
    rows.lost |= (limit != torch.inf) & rows.open


def _top_p(rows: Likeliest, limit: np.ndarray) -> None:
    """The mass is that of the tokens that top_k keeps, else the vocabulary's."""
    mass = (rows.weights * rows.keep).sum(axis=1, keepdims=True)
    if (rows.open & ~rows.lost & np.isfinite(limit)).any():
        mass = np.where(rows.open, rows.total(), mass)
    inside = np.cumsum(rows.weights, axis=1) - rows.weights < limit * mass
    inside[:, 0] = True
    rows.narrow(inside)


def _top_p_on_device(rows: Likeliest, limit: torch.Tensor) -> None:
    mass = torch.where(rows.open, rows.total(), (rows.weights * rows.keep).sum(dim=-1, keepdim=True))
    before, end = rows.weights.cumsum(dim=-1) - rows.weights, limit * mass
    inside = before < end
    inside[:, 0].fill_(True)
    rows.narrow(inside)
    rows.close.append(are_close(before, end, CLOSE * mass))


def _min_p(rows: Likeliest, limit: np.ndarray) -> None:
    rows.narrow(rows.weights >= limit)


def _min_p_on_device(rows: Likeliest, limit: torch.Tensor) -> None:
    rows.narrow(rows.weights >= limit)
    rows.close.append(are_close(rows.weights, limit, CLOSE * limit))


def _typical_p(rows: Likeliest, limit: np.ndarray) -> None:
    """The tokens that are nearest to the distribution's entropy, up to a mass (Meister 2022)."""
    weights = rows.weights * rows.keep
    with np.errstate(divide="ignore", invalid="ignore"):
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        information = -np.log(probabilities)
        entropy = np.nansum(probabilities * information, axis=1, keepdims=True)
        distance = np.abs(information - entropy)  # infinite for what is not kept
    order = np.argsort(distance, axis=1, kind="stable")
    reached = np.cumsum(np.take_along_axis(probabilities, order, 1), axis=1) < limit
    last = np.minimum(reached.sum(axis=1, keepdims=True), weights.shape[1] - 1)
    rows.pick(distance <= np.take_along_axis(distance, np.take_along_axis(order, last, 1), 1))


def _typical_p_on_device(rows: Likeliest, limit: torch.Tensor) -> None:
    """Tokens of equal values are equally near on every device; only others can change places."""
    weights = rows.weights * rows.keep
    probabilities = weights / weights.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    distance = (probabilities.log() + entropy).abs_()  # infinite for what is not kept
    ordered, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(dim=-1)
    last = (reached < limit).sum(dim=-1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    farthest = ordered.gather(1, last)
    others = rows.values != rows.values.gather(1, order.gather(1, last))
    rows.pick(distance <= farthest)
    rows.close += [are_close(distance, farthest, CLOSE) & others, are_close(reached, limit, CLOSE)]


RULES = (
    Rule("top_k", np.inf, lambda wish: min(max(wish, 1), _MOST), _top_k, _top_k_on_device),
    Rule("top_p", np.inf, _mass, _top_p, _top_p_on_device),
    Rule("min_p", 0.0, _share, _min_p, _min_p_on_device),
    Rule("typical_p", np.inf, _mass, _typical_p, _typical_p_on_device),
)
