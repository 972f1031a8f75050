"""One forward pass of the sharded model over the KV cache: all segments of a step, one behind the other.

Takes tensors and says nothing to the host, so that CUDA graphs can hold it. Knows no plans (`autotp`). Models that do
not hand a step on to attention are `masked_pass`'s.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from dsserve.attention.backend import STEP, PagedStep, read_cells, use_paged_attention, use_torch_attention
from dsserve.attention.gather import GatherAttention
from dsserve.attention.triton_pages import TritonAttention, has_triton
from dsserve.core.step_input import StepInput, decode_length, padded_length
from dsserve.core.step_plan import Segment, StepPlan
from dsserve.kernels.host_copy import move
from dsserve.kernels.ops import loaded_ops
from dsserve.kv.block_tables import BlockTables
from dsserve.kv.store import PagedCache
from dsserve.modeling.self_check import TOLERANCE


class PackedPass:
    """The model with its cache.

    Args:
        module: see `ModelRunner`.
        cells: of the cache, those of page 0 among them.
        tables: of the rows' pages.
    """

    def __init__(self, module: Any, cache: PagedCache, tables: BlockTables, device: torch.device) -> None:
        self._module = module
        self._device = device
        self.cache = cache
        self.tables = tables
        # The kernels need the fused writes to the cache, which skip nothing: padding goes to page 0.
        self._triton = None
        if device.type == "cuda" and has_triton() and loaded_ops(device) is not None:
            self._triton = TritonAttention(tables, device)
        self._gather = GatherAttention(tables, device)

    @property
    def triton(self) -> TritonAttention | None:
        """The attention that graphs can hold; None where there is none."""
        return self._triton

    def run(self, step: StepInput, known: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[W, V]` of a step that is not captured.

        Args:
            known: `[n]`, the tokens of `step.sources`' second column are among them.
        """
        total = step.total
        length = padded_length(total) if step.decoded < len(step.rows) else decode_length(total)
        tokens, positions, rows = move(step.padded(length, self.tables.padding), self._device)
        fill_sources(tokens, step, known)
        backend: GatherAttention | TritonAttention = self._gather if self._triton is None else self._triton
        cells = self.tables.cells(rows, positions)
        fresh = backend is self._gather and step.fresh
        return self.forward(
            tokens, positions, cells, move(step.wanted, self._device),
            PagedStep(backend, backend.describe(step)), None if fresh else read_cells,
        )  # fmt: skip

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cells: torch.Tensor,
        wanted: torch.Tensor | int,
        step: PagedStep,
        read: Any,
    ) -> torch.Tensor:
        """One pass on device tensors: tokens, positions and cells `[T]`, wanted `[W]` -> logits `[W, V]`.

        Args:
            wanted: 0 = all.
        """
        window = self.cache.window
        window.cells, window.read = cells, read
        output = self._module(
            input_ids=tokens[None],  # [1, T]
            position_ids=positions[None],  # [1, T]
            attention_mask=None,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=wanted,
            **{STEP: step},
        )
        return output.logits[0]


def fill_sources(tokens: torch.Tensor, step: StepInput, known: torch.Tensor | None) -> None:
    """Enters the tokens that the step before chose."""
    if known is None or not len(step.sources):
        return
    count, in_order = len(step.sources), np.arange(len(step.sources))
    if (step.sources == in_order[:, None]).all():
        tokens[:count].copy_(known[:count])
    else:
        here, there = move(step.sources, tokens.device).unbind(1)
        tokens[here] = known[there]


@torch.inference_mode()
def can_pack(module: Any) -> bool:
    """Switches a model to attention over pages where all of its layers go through it; all ranks must call it.

    Tried on three tokens: the last one's logits are the same when the others lie in the cache.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) or not use_paged_attention(module):
        return False
    try:
        whole, parts = _try_tokens(module, 3), _try_tokens(module, 2, 1)
        can = whole is not None and parts is not None and _are_close(whole, parts)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError):  # a forward that refuses keywords further down, or other lengths
        can = False
    if not can:
        use_torch_attention(module)
    return can


def _try_tokens(module: Any, *sizes: int) -> torch.Tensor | None:
    """The logits of the last token of a text that is read in parts of these sizes, `[1, V]`; None where some layer does
    not attend as the others do."""
    device = next(module.parameters()).device
    tables = BlockTables(1, 16, 16, device)
    cache = PagedCache(module.config.get_text_config().num_hidden_layers, 32)
    packed, backend = PackedPass(module, cache, tables, device), GatherAttention(tables, device)
    start, logits = 0, None
    for size in sizes:
        plan = StepPlan((Segment(0, start, (0,) * size, 0, () if start else (1,)),))
        tables.update(plan)
        taken = StepInput.of(plan)
        step = PagedStep(backend, backend.describe(taken))
        positions = torch.arange(start, start + size, device=device)
        read = None if taken.fresh else read_cells
        logits = packed.forward(positions * 0, positions, positions + 16, positions[-1:] - start, step, read)
        if step.refused or step.seen != len(cache.layers):
            return None
        start += size
    return logits


def _are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).float().norm() <= TOLERANCE[one.dtype] * one.float().norm())
