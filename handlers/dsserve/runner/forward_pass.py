"""One forward pass of the sharded model over the KV slots: a decode step of the first rows, or the prefill of prompts.

Takes tensors and says nothing to the host, so that CUDA graphs can hold it. Knows no rows' lengths and no plans
(`autotp`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from dsserve.attention.decode import uses_decode_attention
from dsserve.attention.prefill import PROMPT_SPANS, PromptSpans, has_flash
from dsserve.kv.cache import SlotCache
from dsserve.modeling.dtype import model_dtype
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.kv_heads import head_size
from dsserve.parallel.rank import RankInfo
from dsserve.runner.prefill_batch import PackedPrompts


class ForwardPass:
    """The model with its cache.

    Args:
        module: see `ModelRunner`.
        rows: of the cache.
        capacity: of a row, in tokens.
    """

    def __init__(self, module: Any, rows: int, capacity: int, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._dtype = model_dtype(module)
        self._capacity = capacity
        config = module.config.get_text_config()
        self._num_layers = config.num_hidden_layers
        self.cache = SlotCache(self._num_layers, rows, capacity)
        self._has_flash = has_flash(self._dtype, head_size(config), device)
        if device.type == "cuda":  # ranks of one step must pad alike
            self._has_flash = bool(agree_on_least(int(self._has_flash), RankInfo.from_env()))
        # Whether each prompt of a pass attends to itself alone; None before a pass has shown that the model hands
        # the spans on.
        self._by_prompt = None if _takes_keywords(module) else False
        self._first_cells = torch.arange(rows, device=device) * capacity
        self._columns = torch.arange(capacity, device=device)

    @property
    def reads_by_span(self) -> bool:
        """Whether prompts find their keys in the cache by their spans, and need no mask."""
        return self._has_flash and bool(self._by_prompt)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, kv_len: int) -> torch.Tensor:
        """One step of the first n rows: tokens and positions `[n]` on the device -> logits `[n, V]`."""
        live = tokens.shape[0]
        window = self.cache.window
        window.cells, window.kv_len = self._first_cells[:live] + positions, kv_len
        hidden = self._columns[:kv_len] > positions[:, None]
        mask = torch.zeros(live, kv_len, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))
        output = self._module(
            input_ids=tokens[:, None],  # [n, 1]
            position_ids=positions[:, None],  # [n, 1]
            attention_mask=mask[:, None, None, :],  # [n, 1, 1, kv_len], additive
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def prefill(
        self, inputs: torch.Tensor, wanted: torch.Tensor, read: torch.Tensor | None, spans: PromptSpans | None
    ) -> torch.Tensor:
        """One pass on device tensors, see `prefill_graphs.Forward`."""
        tokens, positions, cells, prompts = inputs
        window = self.cache.window
        window.cells, window.kv_len, window.whole = cells, None, spans is not None
        window.read, seen, whose = (None, positions, prompts) if read is None else read
        mask = None
        if spans is None:
            hidden = (prompts[:, None] != whose) | (positions[:, None] < seen)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            mask = mask.masked_fill_(hidden, float("-inf"))[None, None]  # [1, 1, T, T or S], additive
        return self._read(tokens, positions, mask, wanted, spans)

    def prefill_packed(self, packed: PackedPrompts) -> torch.Tensor:
        """Logits `[n, V]` of the wanted tokens of a pass that was not captured."""
        window = self.cache.window
        window.cells, window.kv_len = packed.cells.to(self._device), None
        spans = self._spans(packed)
        window.whole = spans is not None and spans.table is not None
        window.read = None if window.whole or packed.read is None else packed.read[0].to(self._device)
        mask = None if spans is not None and self._by_prompt else packed.mask(self._dtype, self._device)
        inputs = (packed.tokens.to(self._device), packed.positions.to(self._device))
        logits = self._read(*inputs, mask, packed.wanted.to(self._device), spans)
        if spans is not None and self._by_prompt is None:
            self._by_prompt = spans.seen == self._num_layers
        return logits

    def _spans(self, packed: PackedPrompts) -> PromptSpans | None:
        """What lets attention look at each prompt alone instead of all tokens under a mask; None where it cannot."""
        if self._by_prompt is False or not uses_decode_attention(self._module):
            return None
        if not self.reads_by_span:
            return PromptSpans(packed.lengths) if packed.read is None else None
        table = packed.spans(len(packed.lengths) + 2, len(packed.tokens)).to(self._device)
        return PromptSpans(packed.lengths, table, max(packed.lengths), self._capacity)

    def _read(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        wanted: torch.Tensor,
        spans: PromptSpans | None,
    ) -> torch.Tensor:
        output = self._module(
            input_ids=tokens[None],  # [1, T]
            position_ids=positions[None],  # [1, T]
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=wanted,
            **({} if spans is None else {PROMPT_SPANS: spans}),
        )
        return output.logits[0]


def _takes_keywords(module: Any) -> bool:
    """Whether the model's forward takes keywords that it does not name, as those take which hand them on."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
