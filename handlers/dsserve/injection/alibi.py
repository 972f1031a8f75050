"""BLOOM's softmax in torch, since DeepSpeed 0.19.8's reads position biases in half precision.

A bias is slope x position, up to some hundred, where fp16 counts in quarters and bf16 in twos: neighbouring tokens
share a bias, and logits are off by 2e-2 in fp16 after 500 tokens (transformers in half precision rounds them alike).
Here they are made and added in fp32. Covers the call that `BloomSelfAttention` makes, over a whole batch or one new
token a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

# Scores that are fp32 at a time: all rows of a decode step, a part of a batch of long prompts.
_MOST_SCORES = 2**26


class AlibiSoftmax(nn.Module):
    """Probabilities of attention with linear biases.

    Args:
        heads: of the model, all ranks together.
    """

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        self._slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].to(device)  # at position 1

    def forward(
        self, attn_scores: torch.Tensor, attn_mask: torch.Tensor, triangular: bool, layer_scale: float,
        head_offset: int, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """What `SoftmaxOp` is called with: scores `[B, H, S, L]` of this rank's heads are overwritten and returned.

        Args:
            attn_mask: `[B, 1, S or 1, L]`, -10000 where a token is hidden; one number: nothing is.
            triangular: the S tokens are the last of L, and see none that come after them.
        """
        rows, heads, new, length = attn_scores.shape
        slopes = self._slopes[head_offset : head_offset + heads, None, None]
        later = None
        if triangular:
            later = torch.ones(new, length, dtype=torch.bool, device=attn_scores.device).triu_(length - new + 1)
        at_once = max(1, _MOST_SCORES // (heads * new * length))
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            total = attn_scores[part].float().mul_(layer_scale)
            if attn_mask.dim() > 1:
                total += slopes * _positions(attn_mask[part])
                total += attn_mask[part].float()
            else:
                total += slopes * torch.arange(length, dtype=torch.float32, device=attn_scores.device)
            if later is not None:
                total.masked_fill_(later, float("-inf"))
            attn_scores[part] = total.softmax(dim=-1)
        return attn_scores


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """`[B, 1, 1, L]`, fp32: each token's place in its own text. Padding has none, and is hidden."""
    return (mask[:, :, -1:] >= 0).cumsum(-1).sub_(1).float()  # the last new token sees all of its text
