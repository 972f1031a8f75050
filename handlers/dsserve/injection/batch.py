"""One batch of prompts through a causal model with injected layers: padded on the left, then a token a row and step.

The kernels count tokens once for all rows, so prompts of unequal length end at the same place, and a row that is not
wanted any more stays until its batch ends. Does not choose tokens and does not know requests (`engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsserve.injection.cache import KernelCache
from dsserve.modeling.dtype import model_dtype

Prompts = Sequence[Sequence[int]]


class KernelBatch:
    """The batch that the kernels hold.

    Args:
        module: DeepSpeed's module, whose layers are `InjectedLayer`.
        max_tokens: prompt + output of a row, padding included: what the kernels' workspace was taken for.
    """

    def __init__(self, module: Any, max_tokens: int, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._dtype = model_dtype(module)
        # BLOOM makes its position bias from the mask of 0 and 1 and asks for no positions.
        self._wants_positions = module.config.model_type != "bloom"
        self._columns = torch.arange(max_tokens, device=device)
        self._cache = KernelCache()
        self._pads = torch.zeros(0, dtype=torch.long, device=device)  # [B]
        self._mask: torch.Tensor | None = None  # of all tokens that the batch can have; None where nothing is padded
        self.rows = 0

    def prefill(self, prompts: Prompts, all_logits: bool = False) -> torch.Tensor:
        """Begins a new batch, whatever became of the last one.

        Args:
            prompts: token ids, at least one a row.
            all_logits: of every position, padding too, instead of the last one.

        Returns:
            logits `[B, V]`, or `[B, longest, V]`.
        """
        self._cache = KernelCache()
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        self.rows = len(prompts)
        self._pads = torch.tensor(pads, device=self._device)
        self._mask = self._make_mask() if any(pads) else None
        tokens = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        logits = self._forward(torch.tensor(tokens, device=self._device), 0 if all_logits else 1)
        return logits if all_logits else logits[:, -1]

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """The next token of every row of the batch -> logits `[B, V]`."""
        return self._forward(torch.tensor(tokens, device=self._device)[:, None], 1)[:, -1]

    def _make_mask(self) -> torch.Tensor:
        hidden = self._columns < self._pads[:, None]  # [B, max_tokens]
        if not self._wants_positions:
            return (~hidden).long()
        summands = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return summands.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None, None]  # [B, 1, 1, max_tokens]

    def _forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        held, new = self._cache.get_seq_length(), tokens.shape[1]
        more: dict[str, torch.Tensor] = {}
        if self._wants_positions:
            more["position_ids"] = (self._columns[held : held + new] - self._pads[:, None]).clamp_(min=0)
        return self._module(
            input_ids=tokens,  # [B, S]
            attention_mask=None if self._mask is None else self._mask[..., : held + new],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **more,
        ).logits
