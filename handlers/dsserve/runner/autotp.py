"""Runs the sharded model on this rank by plans: all segments of a step in one pass, or two.

Every rank holds one and executes the same plans in the same order. Does not choose tokens or texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsserve.core.step_input import StepInput
from dsserve.core.step_plan import StepPlan, Wanted
from dsserve.kv.block_tables import BlockTables
from dsserve.kv.store import PagedCache
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.base import StepLogits, split_logits
from dsserve.runner.forward_pass import PackedPass, can_pack
from dsserve.runner.masked_pass import MaskedPass
from dsserve.runner.step_graphs import StepGraphs
from dsserve.runner.trial import Trial

# A page of the KV cache (vLLM's block size). What texts share is whole pages.
PAGE_TOKENS = 16


@dataclass(frozen=True)
class KVSize:
    """What the KV cache has room for, as on every rank.

    Attributes:
        rows: most texts at a time.
        max_model_len: longest text, in tokens.
        pages: of all texts together.
        page_tokens: of a page.
    """

    rows: int
    max_model_len: int
    pages: int
    page_tokens: int = PAGE_TOKENS

    @classmethod
    def of_rows(cls, rows: int, max_model_len: int, page_tokens: int = PAGE_TOKENS) -> KVSize:
        """Pages for so many texts, each of the whole length."""
        return cls(rows, max_model_len, rows * -(-max_model_len // page_tokens), page_tokens)

    @property
    def row_pages(self) -> int:
        """Pages of the longest text."""
        return -(-self.max_model_len // self.page_tokens)


class ModelRunner:
    """The model and its KV cache.

    Args:
        module: what DeepSpeed made of the model; takes input_ids, position_ids, attention_mask, past_key_values,
            logits_to_keep as transformers' causal language models do.
        memory: refuses steps that do not fit; default: this rank's device.

    Attributes:
        device: of this rank.
        graph_pool: the memory of the captured graphs, for others that never run at the same time; None before.
    """

    def __init__(
        self, module: Any, size: KVSize, rank: RankInfo, device: torch.device, memory: PrefillMemory | None = None
    ) -> None:
        self.size = size
        self.rows, self.max_model_len = size.rows, size.max_model_len
        config = module.config.get_text_config()
        self.vocabulary = config.vocab_size
        self.device, self._world_size = device, rank.world_size
        self._memory = memory or PrefillMemory(device, rank, self.vocabulary)
        self._tables = BlockTables(size.rows, size.max_model_len, size.page_tokens, device)
        self.cache = PagedCache(config.num_hidden_layers, (size.pages + 1) * size.page_tokens)
        kind = PackedPass if agree_on_least(int(can_pack(module)), rank) else MaskedPass
        self._forward: PackedPass | MaskedPass = kind(module, self.cache, self._tables, device)
        self.graph_pool: object | None = None
        self._graphs: StepGraphs | None = None
        self._chosen = 0  # tokens that rank 0 chooses after the last step
        self._no_logits = torch.empty(0, self.vocabulary, device=device)

    @property
    def is_packed(self) -> bool:
        """Whether all segments go through one pass, and graphs can hold it."""
        return isinstance(self._forward, PackedPass) and self._forward.triton is not None

    @torch.inference_mode()
    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """See `Runner`. Where it runs in a graph it does not wait for the device."""
        if not plan.segments:
            return None
        self._tables.update(plan)
        step = StepInput.of(plan)
        known = self._share(chosen) if plan.is_ahead else None
        self._chosen = sum(bool(segment.wanted & Wanted.NEXT) for segment in plan.segments)
        logits = None if self._graphs is None else self._graphs.run(step, known)
        if logits is None:
            logits = self._run_if_it_fits(step, known)
        return StepLogits(self._no_logits, fitted=False) if logits is None else split_logits(logits, plan.segments)

    def _run_if_it_fits(self, step: StepInput, known: torch.Tensor | None) -> torch.Tensor | None:
        """Logits `[W, V]` of a step that is not captured; None on all ranks where one of them has not the memory."""
        if step.decoded == len(step.rows):
            return self._forward.run(step, known)
        # Copies of what prompts read of the cache count as tokens to compute, where attention needs them. Those of
        # decoded texts do not: steps without prompts have them, too.
        read = 0 if self.is_packed else int((step.lengths - step.sizes)[step.decoded :].sum())
        logits = len(step.wanted)
        is_plain = not read and logits <= len(step.rows)
        return self._memory.run(lambda: self._forward.run(step, known), step.total + read, logits, is_plain)

    def capture_graphs(self, is_leader: bool, tokens: int) -> None:
        """Runs steps in CUDA graphs from now on, where the model is packed.

        Args:
            tokens: of a step that reads prompts at most.

        Raises:
            LoadError: see `StepGraphs.capture`.
        """
        if not isinstance(self._forward, PackedPass) or self._forward.triton is None:
            return
        self.trial().step((0, (0,)))  # makes the cache's tensors
        graphs = StepGraphs(self._forward, self.rows, tokens, self.device)
        self.graph_pool = pool = torch.cuda.graph_pool_handle()
        graphs.capture(is_leader, pool)
        self._graphs = graphs

    def trial(self) -> Trial:
        """Texts without a scheduler: at load, before anybody else has pages."""
        return Trial(self, self.size.page_tokens)

    def _share(self, chosen: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's tokens on this rank's device; zeros where rank 0 has none, to warm up."""
        tokens = torch.zeros(self._chosen, dtype=torch.int64, device=self.device) if chosen is None else chosen
        if self._world_size > 1:
            torch.distributed.broadcast(tokens, src=0)
        return tokens
