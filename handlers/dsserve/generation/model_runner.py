"""Runs the sharded model on this rank: prefill of new prompts in one pass, one decode step of all live rows.

Every rank holds one and executes the same plans in the same order. Does not choose tokens or requests.
"""

from __future__ import annotations

from typing import Any

import torch

from dsserve.generation.cuda_graphs import DecodeGraphs
from dsserve.generation.kv_cache import SlotCache
from dsserve.generation.plan import Plan

# Prompts that are prefilled together lie one behind the other and are padded on the right to one of these lengths, then
# to multiples of half the last: each new shape costs 6 to 100 ms the first time on a CPU.
PREFILL_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Attention reads up to the longest live row, rounded up to this.
KV_STEP = 16


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
        self._graphs: DecodeGraphs | None = None
        self._first_cells = torch.arange(slots, device=device) * capacity
        self._columns = torch.arange(capacity, device=device)

    @property
    def live(self) -> int:
        """Number of live rows."""
        return len(self._lengths)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> torch.Tensor | None:
        """Evict, decode, prefill, in this order.

        Returns:
            Logits of the decoded rows, then of the prompts, `[n, V]`, the same on all ranks; None for none.
        """
        for row in plan.evict:
            self._evict(row)
        logits = []
        if plan.tokens:
            logits.append(self._decode(plan.tokens))
        if plan.admit:
            logits.append(self._prefill(plan.admit))
        return torch.cat(logits) if len(logits) > 1 else logits[0] if logits else None

    def _evict(self, row: int) -> None:
        last = self.live - 1
        if row != last:
            self.cache.move(last, row, self._lengths[last])
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def _prefill(self, prompts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = lengths.cumsum(0)
        padding = prefill_bucket(int(ends[-1])) - int(ends[-1])
        tokens = [token for prompt in prompts for token in prompt]
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        cells = (
            torch.arange(self.live, self.live + len(prompts)).repeat_interleave(lengths) * self._capacity + positions
        )
        window = self.cache.window
        window.cells, window.kv_len = cells.to(self._device), None
        output = self._module(
            input_ids=torch.tensor([tokens + [0] * padding], device=self._device),  # [1, T]
            position_ids=torch.nn.functional.pad(positions, (0, padding))[None].to(self._device),  # [1, T]
            attention_mask=None if len(prompts) == 1 else self._block_mask(lengths, padding),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=(ends - 1).to(self._device),
        )
        self._lengths += lengths.tolist()
        return output.logits[0]

    def _block_mask(self, lengths: torch.Tensor, padding: int) -> torch.Tensor:
        """`[1, 1, T, T]`, additive: each token sees its own prompt up to itself. The padding is one more prompt, since
        a token that sees nothing would be NaN. One prompt alone needs no mask: attention is causal, padding behind."""
        lengths = torch.cat([lengths, torch.tensor([padding])])
        prompt = torch.arange(len(lengths)).repeat_interleave(lengths)
        visible = (prompt[:, None] == prompt).tril()
        mask = torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(~visible, float("-inf"))
        return mask[None, None].to(self._device)

    def capture_graphs(self, is_leader: bool) -> None:
        """Decodes in CUDA graphs from now on. No row may be live.

        Raises:
            LoadError: see `DecodeGraphs.capture`.
        """
        self.execute(Plan(admit=((0,),)))  # makes the cache's tensors
        self.execute(Plan(evict=(0,)))
        graphs = DecodeGraphs(self._forward_decode, self.slots, self._capacity, self._device)
        graphs.capture(is_leader)
        self._graphs = graphs

    def _decode(self, tokens: tuple[int, ...]) -> torch.Tensor:
        if self._graphs is not None:
            logits = self._graphs.decode(tokens, self._lengths)
        else:
            kv_len = min(-(-(max(self._lengths) + 1) // KV_STEP) * KV_STEP, self._capacity)
            inputs = torch.tensor([tokens, self._lengths], device=self._device)
            logits = self._forward_decode(inputs[0], inputs[1], kv_len)
        for row in range(len(tokens)):
            self._lengths[row] += 1
        return logits

    def _forward_decode(self, tokens: torch.Tensor, positions: torch.Tensor, kv_len: int) -> torch.Tensor:
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


def prefill_bucket(length: int) -> int:
    """The padded length of a prompt of `length` tokens."""
    for bucket in PREFILL_BUCKETS:
        if length <= bucket:
            return bucket
    step = PREFILL_BUCKETS[-1] // 2
    return -(-length // step) * step
