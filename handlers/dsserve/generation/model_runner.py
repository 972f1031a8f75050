"""Runs the sharded model on this rank: prefill of new prompts in one pass, one decode step of all live rows.

Every rank holds one and executes the same plans in the same order. Does not choose tokens or requests.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from dsserve.distributed import RankInfo, agree_on_least
from dsserve.generation.cuda_graphs import DecodeGraphs
from dsserve.generation.decode_attention import uses_decode_attention
from dsserve.generation.kv_cache import SlotCache
from dsserve.generation.packed_prompts import PackedPrompts
from dsserve.generation.pinned import stage
from dsserve.generation.plan import Admission, Plan, moves
from dsserve.generation.prefill_graphs import PrefillGraphs
from dsserve.generation.prefill_memory import PrefillMemory
from dsserve.generation.prompt_attention import PROMPT_SPANS, PromptSpans, has_flash
from dsserve.generation.runner import StepLogits
from dsserve.sharding.heads import head_size

# Attention reads up to the longest live row, rounded up to this.
KV_STEP = 16


class ModelRunner:
    """The model, its KV slots and the length of each live row.

    Args:
        module: what DeepSpeed made of the model; takes input_ids, position_ids, attention_mask, past_key_values,
            logits_to_keep as transformers' causal language models do.
        slots: most live rows.
        max_model_len: prompt + output of one row, in tokens.
        kept: rows behind the slots for prompts that may come again.
        memory: refuses prefills that do not fit; default: this rank's device.

    Attributes:
        graph_pool: the memory of the captured graphs, for others that never run at the same time; None before.
    """

    def __init__(
        self,
        module: Any,
        slots: int,
        max_model_len: int,
        device: torch.device,
        kept: int = 0,
        memory: PrefillMemory | None = None,
    ) -> None:
        self._module = module
        self._device = device
        self._dtype = next(module.parameters()).dtype
        self.slots = slots
        self.kept = kept
        self.max_model_len = max_model_len
        self.vocabulary = module.config.get_text_config().vocab_size
        self._world_size = RankInfo.from_env().world_size
        self._memory = memory or PrefillMemory(device, RankInfo.from_env(), self.vocabulary)
        text_config = module.config.get_text_config()
        self._num_layers = text_config.num_hidden_layers
        self._has_flash = has_flash(self._dtype, head_size(text_config), device)
        if device.type == "cuda":  # ranks of one step must pad alike
            self._has_flash = bool(agree_on_least(int(self._has_flash), RankInfo.from_env()))
        # Whether each prompt of a pass attends to itself alone; None before a pass has shown that the model hands
        # the spans on.
        self._by_prompt = None if _takes_keywords(module) else False
        capacity = -(-max_model_len // KV_STEP) * KV_STEP
        self.cache = SlotCache(self._num_layers, slots + kept, capacity)
        self._capacity = capacity
        self._lengths: list[int] = []
        self._has_part = False  # the last row's prompt is not complete
        self.graph_pool: object | None = None
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self._first_cells = torch.arange(slots, device=device) * capacity
        self._columns = torch.arange(capacity, device=device)
        self._no_logits = torch.empty(0, self.vocabulary, device=device)

    @property
    def live(self) -> int:
        """Number of live rows."""
        return len(self._lengths)

    @torch.inference_mode()
    def execute(self, plan: Plan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """See `Runner`. An `ahead` plan does not wait for the device."""
        if plan.rewind:
            self._lengths = [length - 1 for length in self._lengths]
        for row, copy in plan.keep:
            self.cache.copy(row, copy, self._lengths[row])
        for row in plan.evict:
            self._evict(row)
        decoded = self._decode(plan, chosen) if plan.tokens else None
        if not plan.admit:
            return None if decoded is None else StepLogits(decoded)
        logits = self._prefill_if_it_fits(plan.admit)
        if logits is None:
            return StepLogits(self._no_logits if decoded is None else decoded, admitted=False)
        sizes = [len(admission.tokens) if admission.all_logits else 1 for admission in plan.admit]
        parts = logits.split(sizes)
        last = logits if sum(sizes) == len(sizes) else torch.stack([part[-1] for part in parts])
        prompts = tuple(part for part, admission in zip(parts, plan.admit, strict=True) if admission.all_logits)
        return StepLogits(last if decoded is None else torch.cat([decoded, last]), prompts)

    def _evict(self, row: int) -> None:
        for source, target in moves(row, self.live, self._has_part):
            self.cache.copy(source, target, self._lengths[source])
            self._lengths[target] = self._lengths[source]
        if row == self.live - 1:
            self._has_part = False
        self._lengths.pop()

    def _prefill_if_it_fits(self, prompts: tuple[Admission, ...]) -> torch.Tensor | None:
        """What `_prefill` gives, or None on all ranks where one of them has not the memory for it."""
        # Tokens that were computed before are only read, which takes less: where memory is short, long prompts are
        # refused as if they were read in one pass, and no pass fails on the way.
        tokens = sum(prompt.shared + len(prompt.tokens) for prompt in prompts)
        logits = sum(len(prompt.tokens) if prompt.all_logits else 1 for prompt in prompts)
        return self._memory.run(lambda: self._prefill(prompts), tokens, logits)

    def _prefill(self, prompts: tuple[Admission, ...]) -> torch.Tensor:
        """Logits `[n, V]` of the prompts' last tokens; of all tokens where a prompt wants them."""
        first = self.live - prompts[0].continues
        for row, prompt in enumerate(prompts, start=first):
            if prompt.shared and not prompt.continues:
                self.cache.copy(prompt.source, row, prompt.shared)
        packed = PackedPrompts(prompts, first, self._capacity)
        logits = self._prefill_graphs.run(packed) if self._prefill_graphs is not None else None
        if logits is None:
            logits = self._prefill_eagerly(packed)
        self._lengths[first:] = [prompt.shared + len(prompt.tokens) for prompt in prompts]
        self._has_part = not prompts[-1].complete
        return logits

    def _prefill_eagerly(self, packed: PackedPrompts) -> torch.Tensor:
        window = self.cache.window
        window.cells, window.kv_len = packed.cells.to(self._device), None
        spans = self._spans(packed)
        window.whole = spans is not None and spans.table is not None
        window.read = None if window.whole or packed.read is None else packed.read[0].to(self._device)
        mask = None if spans is not None and self._by_prompt else packed.mask(self._dtype, self._device)
        output = self._module(
            input_ids=packed.tokens[None].to(self._device),  # [1, T]
            position_ids=packed.positions[None].to(self._device),  # [1, T]
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=packed.wanted.to(self._device),
            **({} if spans is None else {PROMPT_SPANS: spans}),
        )
        if spans is not None and self._by_prompt is None:
            self._by_prompt = spans.seen == self._num_layers
        return output.logits[0]

    def _spans(self, packed: PackedPrompts) -> PromptSpans | None:
        """What lets attention look at each prompt alone instead of all tokens under a mask; None where it cannot."""
        if self._by_prompt is False or not uses_decode_attention(self._module):
            return None
        if not (self._has_flash and self._by_prompt):
            return PromptSpans(packed.lengths) if packed.read is None else None
        table = packed.spans(len(packed.lengths) + 2, len(packed.tokens)).to(self._device)
        return PromptSpans(packed.lengths, table, max(packed.lengths), self._capacity)

    def _forward_prefill(
        self, inputs: torch.Tensor, wanted: torch.Tensor, read: torch.Tensor | None, spans: PromptSpans | None
    ) -> torch.Tensor:
        """One pass on device tensors, see `PrefillGraphs`."""
        tokens, positions, cells, prompts = inputs
        window = self.cache.window
        window.cells, window.kv_len, window.whole = cells, None, spans is not None
        window.read, seen, whose = (None, positions, prompts) if read is None else read
        mask, more = None, {}
        if spans is None:
            hidden = (prompts[:, None] != whose) | (positions[:, None] < seen)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            mask = mask.masked_fill_(hidden, float("-inf"))[None, None]  # [1, 1, T, T or S], additive
        else:
            more = {PROMPT_SPANS: spans}
        output = self._module(
            input_ids=tokens[None],  # [1, T]
            position_ids=positions[None],  # [1, T]
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=wanted,
            **more,
        )
        return output.logits[0]

    def capture_graphs(self, is_leader: bool, prefill: bool = False) -> None:
        """Decodes in CUDA graphs from now on, and prefills short prompts in them where wanted. No row may be live.

        Args:
            prefill: needs writes to the cache that skip negative cells (`gpu_ops`).

        Raises:
            LoadError: see `cuda_graphs.capture`.
        """
        self.execute(Plan(admit=(Admission((0,)),)))  # makes the cache's tensors
        self.execute(Plan(evict=(0,)))
        self.graph_pool = pool = torch.cuda.graph_pool_handle()
        graphs = DecodeGraphs(self._forward_decode, self.slots, self._capacity, self._device)
        graphs.capture(is_leader, pool)
        self._graphs = graphs
        if prefill:
            by_prompt = self._has_flash and bool(self._by_prompt)
            passes = PrefillGraphs(self._forward_prefill, self.slots, self.max_model_len - 1, self._device, by_prompt)
            passes.capture(pool)
            self._prefill_graphs = passes

    def _decode(self, plan: Plan, chosen: torch.Tensor | None) -> torch.Tensor:
        tokens = plan.tokens
        known = self._share(len(tokens), chosen) if plan.ahead else None
        if self._graphs is not None:
            logits = self._graphs.decode(tokens, self._lengths, known)
        else:
            lengths = self._lengths[: len(tokens)]
            kv_len = min(-(-(max(lengths) + 1) // KV_STEP) * KV_STEP, self._capacity)
            inputs = stage([tokens, lengths], torch.int64, self._device).to(self._device, non_blocking=True)
            logits = self._forward_decode(inputs[0] if known is None else known, inputs[1], kv_len)
        for row in range(len(tokens)):
            self._lengths[row] += 1
        return logits

    def _share(self, count: int, chosen: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's tokens `[count]` on this rank's device; zeros where rank 0 has none, to warm up."""
        tokens = torch.zeros(count, dtype=torch.int64, device=self._device) if chosen is None else chosen
        if self._world_size > 1:
            torch.distributed.broadcast(tokens, src=0)
        return tokens

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


def _takes_keywords(module: Any) -> bool:
    """Whether the model's forward takes keywords that it does not name, as those take which hand them on."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
