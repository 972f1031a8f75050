"""The last residual addition of a layer in torch, where DeepSpeed 0.19.8's own is wrong.

Layers without biases (Llama): the MLP operation has added attention's output to the residual in place, and DeepSpeed
adds it once more. Layers that normalize last (BERT, OPT-350m), on several ranks: every rank adds the whole residual and
bias to its part of the MLP's output before the ranks' parts are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SummedResidual(nn.Module):
    """residual / ranks + this rank's part of the MLP's output."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._share = 1.0 / ranks

    def forward(
        self,
        hidden_state: torch.Tensor,
        residual_add: torch.Tensor,
        final_bias: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """What `ResidualAddOp` is called with; `residual_add` `[B, S, H]` is what the MLP's output is added to."""
        if final_bias is not None:
            residual_add = residual_add + final_bias
        return torch.add(hidden_state, residual_add, alpha=self._share)
