"""Runs the sharded model on this rank by plans: prefill of new prompts, one decode step of all live rows.

Every rank holds one and executes the same plans in the same order. Does not choose tokens or requests.
"""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.step_plan import Admission, Plan, moves
from dsserve.kernels.host_copy import stage
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.base import StepLogits, prefill_at_load
from dsserve.runner.decode_graphs import DecodeGraphs
from dsserve.runner.forward_pass import ForwardPass
from dsserve.runner.prefill_batch import PackedPrompts
from dsserve.runner.prefill_graphs import PrefillGraphs

# Attention reads up to the longest live row, rounded up to this.
KV_STEP = 16


def row_capacity(length: int) -> int:
    """Cells of a row of the KV cache for so many tokens, or of what attention reads for them."""
    return -(-length // KV_STEP) * KV_STEP


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
        forward: the model's passes, and its cache.
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
        self._device = device
        self.slots = slots
        self.kept = kept
        self.max_model_len = max_model_len
        self.vocabulary = module.config.get_text_config().vocab_size
        self._world_size = RankInfo.from_env().world_size
        self._memory = memory or PrefillMemory(device, RankInfo.from_env(), self.vocabulary)
        self._capacity = row_capacity(max_model_len)
        self.forward = ForwardPass(module, slots + kept, self._capacity, device)
        self.cache = self.forward.cache
        self._lengths: list[int] = []
        self._has_part = False  # the last row's prompt is not complete
        self.graph_pool: object | None = None
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
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
        if plan.admit and (together := self._run_captured(plan.admit, plan.tokens)) is not None:
            return StepLogits(together)
        decoded = self._decode(plan, chosen) if plan.tokens else None
        if not plan.admit:
            return None if decoded is None else StepLogits(decoded)
        logits = self._run_captured(plan.admit) if plan.tokens else None
        if logits is None:
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

    def _run_captured(self, prompts: tuple[Admission, ...], tokens: tuple[int, ...] = ()) -> torch.Tensor | None:
        """Logits `[n, V]` of the rows that decode `tokens` and of the prompts from one captured pass, which reads the
        weights once and has its memory already; None where there is no such graph. A decoded row is a prompt of one
        token then, the rest of which lies in the cache."""
        graphs, decoded = self._prefill_graphs, len(tokens)
        first = self.live - prompts[0].continues
        if graphs is None or (decoded and not (graphs.by_prompt and decoded == first)):
            return None
        lengths = self._lengths[:decoded]
        rows = [Admission((token,), shared=length) for token, length in zip(tokens, lengths, strict=True)]
        packed = PackedPrompts((*rows, *prompts), first - decoded, self._capacity)
        graph = graphs.find(packed)
        if graph is None:
            return None
        self._take_over(prompts)
        for row in range(decoded):
            self._lengths[row] += 1
        self._enter(prompts)
        return graph.run(packed)

    def _prefill_if_it_fits(self, prompts: tuple[Admission, ...]) -> torch.Tensor | None:
        """Logits `[n, V]` of the prompts' last tokens, of all tokens where a prompt wants them; None on all ranks where
        one of them has not the memory for it."""

        def prefill() -> torch.Tensor:
            self._take_over(prompts)
            packed = PackedPrompts(prompts, self.live - prompts[0].continues, self._capacity)
            logits = self.forward.prefill_packed(packed)
            self._enter(prompts)
            return logits

        # Tokens that were computed before are only read, which takes nothing where prompts are read by their spans, and
        # less than to compute them under a mask. There they count all the same: where memory is short, long prompts are
        # refused as if they were read in one pass, and no pass fails on the way.
        computed = sum(len(prompt.tokens) for prompt in prompts)
        read = 0 if self.forward.reads_by_span else sum(prompt.shared for prompt in prompts)
        logits = sum(len(prompt.tokens) if prompt.all_logits else 1 for prompt in prompts)
        return self._memory.run(prefill, computed + read, logits, is_plain=not read and logits == len(prompts))

    def _take_over(self, prompts: tuple[Admission, ...]) -> None:
        """Copies the beginnings that lie in other rows to those that the prompts will have."""
        for row, prompt in enumerate(prompts, start=self.live - prompts[0].continues):
            if prompt.shared and not prompt.continues:
                self.cache.copy(prompt.source, row, prompt.shared)

    def _enter(self, prompts: tuple[Admission, ...]) -> None:
        """Notes the rows of prompts that were read."""
        first = self.live - prompts[0].continues
        self._lengths[first:] = [prompt.shared + len(prompt.tokens) for prompt in prompts]
        self._has_part = not prompts[-1].complete

    def capture_graphs(self, is_leader: bool, prefill_tokens: int = 0) -> None:
        """Decodes in CUDA graphs from now on, and prefills in them where wanted. No row may be live.

        Args:
            prefill_tokens: of the prompts of a pass at most; 0 = prefill stays as it is. Else it needs writes to the
                cache that skip negative cells (`gpu_ops`).

        Raises:
            LoadError: see `decode_graphs.capture`.
        """
        prefill_at_load(self, Plan(admit=(Admission((0,)),)))  # makes the cache's tensors
        self.execute(Plan(evict=(0,)))
        self.graph_pool = pool = torch.cuda.graph_pool_handle()
        graphs = DecodeGraphs(self.forward.decode, self.slots, self._capacity, self._device)
        graphs.capture(is_leader, pool)
        self._graphs = graphs
        if prefill_tokens:
            longest, by_prompt = self.max_model_len - 1, self.forward.reads_by_span
            passes = PrefillGraphs(self.forward.prefill, self.slots, longest, self._device, by_prompt, prefill_tokens)
            passes.capture(pool)
            self._prefill_graphs = passes

    def _decode(self, plan: Plan, chosen: torch.Tensor | None) -> torch.Tensor:
        tokens = plan.tokens
        known = self._share(len(tokens), chosen) if plan.ahead else None
        if self._graphs is not None:
            logits = self._graphs.decode(tokens, self._lengths, known)
        else:
            lengths = self._lengths[: len(tokens)]
            kv_len = min(row_capacity(max(lengths) + 1), self._capacity)
            inputs = stage([tokens, lengths], torch.int64, self._device).to(self._device, non_blocking=True)
            logits = self.forward.decode(inputs[0] if known is None else known, inputs[1], kv_len)
        for row in range(len(tokens)):
            self._lengths[row] += 1
        return logits

    def _share(self, count: int, chosen: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's tokens `[count]` on this rank's device; zeros where rank 0 has none, to warm up."""
        tokens = torch.zeros(count, dtype=torch.int64, device=self._device) if chosen is None else chosen
        if self._world_size > 1:
            torch.distributed.broadcast(tokens, src=0)
        return tokens
