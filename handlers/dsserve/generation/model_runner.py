"""Runs the sharded model on this rank: prefill of one prompt, one decode step of all live rows.

Every rank holds one and executes the same plans in the same order. Does not choose tokens or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsserve.generation.kv_cache import SlotCache
from dsserve.generation.plan import Plan

# Prompts are padded on the right to one of these lengths, then to multiples of the last: each new shape costs 6 to
# 100 ms the first time on a CPU. Causal attention never looks right, so padding changes no logit of the prompt.
PREFILL_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Attention reads up to the longest live row, rounded up to this.
KV_STEP = 16


@dataclass(frozen=True)
class StepLogits:
    """Logits of one step, the same on all ranks: `decode` is `[n, V]` or None, `prefill` one `[V]` a prompt."""

    decode: torch.Tensor | None
    prefill: list[torch.Tensor]

    def decode_rows(self) -> list[torch.Tensor]:
        """One `[V]` a decoded row."""
        return [] if self.decode is None else list(self.decode)


class ModelRunner:
    """The model, its KV slots and the length of each live row.

    Args:
        module: what DeepSpeed made of the model; takes input_ids, position_ids, attention_mask, past_key_values,
            logits_to_keep as transformers' causal language models do.
        slots: most live rows.
        max_model_len: prompt + output of one row, in tokens.
    """

    def __init__(self, module: Any, slots: int, max_model_len: int, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._dtype = next(module.parameters()).dtype
        self.slots = slots
        self.max_model_len = max_model_len
        num_layers = module.config.get_text_config().num_hidden_layers
        capacity = -(-max_model_len // KV_STEP) * KV_STEP
        self.cache = SlotCache(num_layers, slots, capacity)
        self._capacity = capacity
        self._lengths: list[int] = []
        self._first_cells = torch.arange(slots, device=device) * capacity
        self._columns = torch.arange(capacity, device=device)

    @property
    def live(self) -> int:
        """Number of live rows."""
        return len(self._lengths)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepLogits:
        """Evict, decode, prefill, in this order."""
        for row in plan.evict:
            self._evict(row)
        decode = self._decode(plan.tokens) if plan.tokens else None
        return StepLogits(decode, [self._prefill(prompt) for prompt in plan.admit])

    def _evict(self, row: int) -> None:
        last = self.live - 1
        if row != last:
            self.cache.move(last, row, self._lengths[last])
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def _prefill(self, prompt: tuple[int, ...]) -> torch.Tensor:
        length = len(prompt)
        padded = min(prefill_bucket(length), self._capacity)
        input_ids = torch.zeros(1, padded, dtype=torch.int64)
        input_ids[0, :length] = torch.tensor(prompt)
        self.cache.window.prefill_row = self.live
        output = self._module(
            input_ids=input_ids.to(self._device),
            position_ids=self._columns[None, :padded],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=torch.tensor([length - 1], device=self._device),
        )
        self._lengths.append(length)
        return output.logits[0, -1]

    def _decode(self, tokens: tuple[int, ...]) -> torch.Tensor:
        live = len(tokens)
        positions = torch.tensor(self._lengths, device=self._device)
        kv_len = min(-(-(max(self._lengths) + 1) // KV_STEP) * KV_STEP, self._capacity)
        window = self.cache.window
        window.prefill_row, window.cells, window.kv_len = None, self._first_cells[:live] + positions, kv_len
        visible = self._columns[:kv_len] <= positions[:, None]
        mask = torch.zeros(live, kv_len, dtype=self._dtype, device=self._device).masked_fill_(~visible, float("-inf"))
        output = self._module(
            input_ids=torch.tensor(tokens, device=self._device)[:, None],  # [n, 1]
            position_ids=positions[:, None],  # [n, 1]
            attention_mask=mask[:, None, None, :],  # [n, 1, 1, kv_len], additive
            past_key_values=self.cache,
            use_cache=True,
        )
        for row in range(live):
            self._lengths[row] += 1
        return output.logits[:, -1]


def prefill_bucket(length: int) -> int:
    """The padded length of a prompt of `length` tokens."""
    for bucket in PREFILL_BUCKETS:
        if length <= bucket:
            return bucket
    step = PREFILL_BUCKETS[-1] // 2
    return -(-length // step) * step
