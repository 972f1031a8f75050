"""Weights of a whole vocabulary in blocks of tokens, and the token at a place of their cumulative sum.

Within a block sums are fp32, across blocks fp64: a row's sums are then the same to fp64's rounding whatever rows are
computed beside it. Nothing here waits for the device or depends on values in its shapes, so that a CUDA graph can hold
it. Rules that narrow the vocabulary are `rules`'.
"""

from __future__ import annotations

import torch

BLOCK = 64
_BELOW_ONE = 1 - 1e-12


def split(rows: torch.Tensor, filler: float) -> torch.Tensor:
    """Rows `[n, V]` as blocks `[n, B, BLOCK]`, the last one filled up; a view where V is a multiple of `BLOCK`."""
    missing = -rows.shape[1] % BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing), value=filler) if missing else rows
    return padded.view(rows.shape[0], -1, BLOCK)


def weigh(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """exp(logit - largest) of rows `[n, V]`, fp32, as blocks `[n, B, BLOCK]`; `largest` is each row's, `[n, 1]`."""
    return split((logits - largest).exp_(), 0.0)


def sum_blocks(weights: torch.Tensor) -> torch.Tensor:
    """The sum of each block, `[n, B, BLOCK]` -> `[n, B]`, fp64."""
    return weights.sum(dim=-1).double()


def find_places(weights: torch.Tensor, cumulative: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row at a place of the cumulative distribution of its weights, `[n, 1]`, int64.

    First the block in which the place lies, then the token in it.

    Args:
        weights: `[n, B, BLOCK]`, fp32.
        cumulative: `[n, B]`, fp64, of `sum_blocks`.
        uniforms: the places, `[n, 1]`, fp64, 0 to 1.
    """
    at = uniforms * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, at, right=True).clamp_(max=cumulative.shape[1] - 1)  # [n, 1]
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)  # [n, BLOCK]
    at -= torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    at = torch.minimum(at, inside[:, -1:] * _BELOW_ONE)  # the block's sum was rounded in fp32
    return block * BLOCK + torch.searchsorted(inside, at, right=True)
