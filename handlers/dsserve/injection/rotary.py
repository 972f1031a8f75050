"""Rotary positions in torch, where DeepSpeed 0.19.8's kernels get them wrong.

`apply_rotary_pos_emb.cu` gives each head a power of two of threads: with heads of 80 or 96 values the last threads
write back values of the next head, which other threads rotate at the same time. `transform.cu`'s float form reads the
first value of a pair after it was overwritten (GPT-J in fp32). Default frequencies only (`families` refuses others).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsserve.injection.workspace import Workspace


def kernel_rotates(config: Any) -> bool:
    """Whether the kernels rotate rightly for DeepSpeed's layer config `config`."""
    head = config.hidden_size // config.heads
    if config.rotate_half:
        pairs = 4 // config.dtype.itemsize  # the least that its threads load at a time
        return head & (head - 1) == 0 and (config.rotary_dim // 2) % pairs == 0
    return config.dtype is not torch.float32


class RotatedAttention(nn.Module):
    """DeepSpeed's attention operation behind a rotation of queries and keys.

    Args:
        attention: a `SoftmaxContextOp`; its config's rotary_dim is taken over, and the kernels rotate no more.
    """

    def __init__(self, attention: Any, workspace: Workspace) -> None:
        super().__init__()
        self._attention = attention
        self._workspace = workspace
        config = attention.config
        self._half, self._dim = bool(config.rotate_half), int(config.rotary_dim)
        self._head = config.hidden_size // config.heads
        exponents = torch.arange(0, self._dim, 2, dtype=torch.float32) / self._dim
        angles = torch.outer(torch.arange(workspace.size.tokens), 1.0 / config.rope_theta**exponents)
        self._table = (angles.cos(), angles.sin())  # each [tokens, dim / 2], fp32
        config.rotary_dim = -1

    def forward(self, query_key_value: torch.Tensor, **kwargs: Any) -> Any:
        """`[B, S, 3 * heads * head size]`, rotated in place."""
        batch, new = query_key_value.shape[:2]
        if self._table[0].device != query_key_value.device:
            self._table = (self._table[0].to(query_key_value.device), self._table[1].to(query_key_value.device))
        first = self._workspace.tokens - new
        cos, sin = (part[first : first + new, None, None] for part in self._table)
        heads = query_key_value.view(batch, new, 3, -1, self._head)[:, :, :2, :, : self._dim].transpose(2, 3)
        if self._half:
            one, other = heads.chunk(2, dim=-1)
        else:
            one, other = heads[..., ::2], heads[..., 1::2]
        rotated = one * cos - other * sin, other * cos + one * sin  # fp32: the table is; both before either is written
        one.copy_(rotated[0])
        other.copy_(rotated[1])
        return self._attention(query_key_value=query_key_value, **kwargs)
