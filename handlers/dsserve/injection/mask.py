"""Attention masks as transformers makes them -> as the kernels read them.

The kernels add `[B, 1, S or 1, L]`, in the layer's dtype and without gaps, to the scores; L must be the number of
tokens they hold. BLOOM's layer wants 1 where nothing may be seen instead. Causal order is the kernels' own affair.
"""

from __future__ import annotations

import torch


def additive(mask: torch.Tensor, batch: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """`mask` as summands, `[B, 1, S or 1, tokens]`.

    Args:
        mask: `[B or 1, 1, S, L]` with L >= tokens: bool (True = visible) or summands.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch) or mask.shape[-1] < tokens:
        raise ValueError(f"attention mask {list(mask.shape)}: the kernels need [{batch}, 1, S, {tokens}]")
    mask = mask[..., :tokens]
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask.to(dtype).expand(batch, -1, -1, -1).contiguous()


def in_window(mask: torch.Tensor | None, window: int, tokens: int, hidden: torch.Tensor) -> torch.Tensor | None:
    """`mask` for a layer with local attention: each token sees the last `window` ones, itself included.

    The kernels have a window of their own, which hides more than that (`attn_softmax_v2` of softmax.cu decides for four
    tokens by the first of them, though they lie far from each other).

    Args:
        mask: what `additive` made, or None where nothing is hidden.
        tokens: how many the kernels hold; those of this pass are the last ones.
        hidden: what the layer reads, `[B, S, H]`.

    Returns:
        `[B, 1, S, tokens]`; `mask` itself where all tokens lie in every window.
    """
    if tokens <= window:
        return mask
    batch, new, _ = hidden.shape
    columns = torch.arange(tokens, device=hidden.device)
    outside = columns <= columns[tokens - new :, None] - window
    whole = hidden.new_zeros(batch, 1, new, tokens) if mask is None else mask.expand(-1, -1, new, -1)
    return whole.masked_fill(outside, torch.finfo(hidden.dtype).min)


def as_ones(mask: torch.Tensor) -> torch.Tensor:
    """1 where summands hide a token, else 0, in the same dtype."""
    return (mask < 0).to(mask.dtype)
