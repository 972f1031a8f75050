"""Steps as CUDA graphs: one launch instead of some hundred.

A graph is captured for numbers of texts that are decoded, and for numbers of tokens of steps that read prompts, decoded
texts among them; a step takes the smallest that fits. None depends on the length of a text: attention finds pages and
lengths in tensors that each replay fills. Does not sample.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from dsserve.attention.backend import PagedStep, read_cells
from dsserve.attention.triton_pages import LONG, TritonMeta
from dsserve.core.step_input import PREFILL_BUCKETS, StepInput
from dsserve.kernels.cuda_graph import capture
from dsserve.kernels.host_copy import move
from dsserve.runner.forward_pass import PackedPass, fill_sources

logger = logging.getLogger(__name__)

# The same shape's eager pass of 1024 tokens takes 57 ms on an H100 with TP=2, of which most is the host's.
_MORE_LENGTHS = (768, 1024, 1536, 2048, 3072, 4096)
MOST_TOKENS = _MORE_LENGTHS[-1]
_ROW_STEPS = ((8, 2), (32, 8), (64, 16), (256, 32))  # up to so many rows in steps of so many; then doubled


@dataclass(frozen=True)
class _Captured:
    """One graph with the tensors it reads; it writes the logits that all graphs share.

    Attributes:
        inputs: `[3, T]`, int64: tokens, positions, rows.
        segments: `[3, n + 1]`, int64: rows, lengths and starts; None where all have one token.
        wanted: `[W]`, int64.
    """

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    segments: torch.Tensor | None = None
    wanted: torch.Tensor | None = None


class StepGraphs:
    """The captured steps of one model; all ranks capture and replay them in the same order.

    Args:
        rows: most texts of a step.
        tokens: of steps that read prompts at most; 0 = only steps that decode are captured.
    """

    def __init__(self, packed: PackedPass, rows: int, tokens: int, device: torch.device) -> None:
        assert packed.triton is not None, "graphs need attention that does not depend on lengths"
        self._packed, self._attention = packed, packed.triton
        self._device = device
        self._most_rows = rows
        self._row_counts = row_counts(rows)
        self._token_counts = token_counts(tokens)
        self._decode: dict[tuple[int, bool], _Captured] = {}
        self._mixed: dict[int, _Captured] = {}
        self._logits: torch.Tensor | None = None  # [rows, V], of the step that ran last

    @torch.inference_mode()
    def capture(self, is_leader: bool, pool: object) -> None:
        """Captures every shape, the largest first, since the others can use its memory again.

        Args:
            pool: `torch.cuda.graph_pool_handle()`, shared by graphs that never run at the same time.

        Raises:
            LoadError: the model does something that a graph cannot hold.
        """
        started, reserved = time.perf_counter(), torch.cuda.memory_reserved(self._device)
        is_long = self._packed.tables.most_tokens > LONG
        shapes = [(count, long) for count in reversed(self._row_counts) for long in ({False, is_long})]
        total, done = len(self._token_counts) + len(shapes), 0

        def tell() -> None:
            if is_leader and done in (1, total):
                grown = (torch.cuda.memory_reserved(self._device) - reserved) / 2**30
                seconds = time.perf_counter() - started
                logger.info("[dsserve] CUDA graphs: %d of %d, %.1f s, %.2f GiB", done, total, seconds, grown)

        for tokens in reversed(self._token_counts):
            self._mixed[tokens] = self._capture_mixed(tokens, pool)
            done += 1
            tell()
        for count, long in shapes:
            self._decode[count, long] = self._capture_decode(count, long, pool)
            done += 1
            tell()

    def _capture_decode(self, count: int, is_long: bool, pool: object) -> _Captured:
        inputs = self._empty_inputs(count)
        _, positions, rows = inputs

        def run() -> torch.Tensor:
            meta = TritonMeta(rows, positions + 1, is_long=is_long)
            return self._forward(inputs, 0, meta)

        return _Captured(capture(run, pool, self._device)[0], inputs)

    def _capture_mixed(self, tokens: int, pool: object) -> _Captured:
        inputs, count = self._empty_inputs(tokens), min(tokens, self._most_rows)
        segments = torch.zeros(3, count + 1, dtype=torch.int64, device=self._device)
        segments[0] = self._packed.tables.padding
        wanted = torch.zeros(count, dtype=torch.int64, device=self._device)

        def run() -> torch.Tensor:
            meta = TritonMeta(segments[0, :-1], segments[1, :-1], segments[2])
            return self._forward(inputs, wanted, meta)

        return _Captured(capture(run, pool, self._device)[0], inputs, segments, wanted)

    def _empty_inputs(self, tokens: int) -> torch.Tensor:
        inputs = torch.zeros(3, tokens, dtype=torch.int64, device=self._device)
        inputs[2] = self._packed.tables.padding
        return inputs

    def _forward(self, inputs: torch.Tensor, wanted: torch.Tensor | int, meta: TritonMeta) -> torch.Tensor:
        tokens, positions, rows = inputs
        cells = self._packed.tables.cells(rows, positions)
        step = PagedStep(self._attention, meta)
        logits = self._packed.forward(tokens, positions, cells, wanted, step, read_cells)
        if self._logits is None:
            self._logits = logits.new_zeros(self._most_rows, logits.shape[-1])
        return self._logits[: len(logits)].copy_(logits)

    def run(self, step: StepInput, known: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits `[W, V]` of a step, see `PackedPass.run`; None where there is no graph for it. Does not wait for the
        device."""
        if len(step.wanted) > len(step.rows):
            return None  # somebody wants the logits of a whole prompt
        found = self._run_decode(step, known) if step.decoded == len(step.rows) else self._run_mixed(step, known)
        # The next replay overwrites what the graph wrote.
        return None if found is None else found.clone()

    def _run_decode(self, step: StepInput, known: torch.Tensor | None) -> torch.Tensor | None:
        count = len(step.rows)
        size = next((size for size in self._row_counts if size >= count), None)
        if size is None:
            return None
        is_long = int(step.lengths.max()) > LONG
        captured = self._decode[size, is_long]
        self._fill_inputs(captured.inputs, step, known)
        captured.graph.replay()
        assert self._logits is not None
        if len(step.wanted) == count:
            return self._logits[:count]
        return self._logits[move(step.wanted, self._device)]

    def _run_mixed(self, step: StepInput, known: torch.Tensor | None) -> torch.Tensor | None:
        size = next((size for size in self._token_counts if size >= step.total), None)
        if size is None or len(step.rows) > self._most_rows:
            return None
        captured = self._mixed[size]
        assert captured.segments is not None and captured.wanted is not None and self._logits is not None
        self._fill_inputs(captured.inputs, step, known)
        count, room = len(step.rows), captured.segments.shape[1]
        segments = np.zeros((3, room), dtype=np.int64)
        segments[0], segments[2] = self._packed.tables.padding, step.total
        segments[0, :count], segments[1, :count], segments[2, : count + 1] = step.rows, step.lengths, step.starts
        captured.segments.copy_(move(segments, self._device))
        wanted = len(step.wanted)
        if wanted:
            captured.wanted[:wanted].copy_(move(step.wanted, self._device))
        captured.graph.replay()
        return self._logits[:wanted]

    def _fill_inputs(self, inputs: torch.Tensor, step: StepInput, known: torch.Tensor | None) -> None:
        inputs.copy_(move(step.padded(inputs.shape[1], self._packed.tables.padding), self._device))
        fill_sources(inputs[0], step, known)


def row_counts(rows: int) -> list[int]:
    """The numbers of texts that decode graphs are captured for, up to `rows`."""
    counts, at = [1], 1
    while at < rows:
        step = next((step for most, step in _ROW_STEPS if at < most), at)
        at = min(rows, at + step if at > 1 else 2)
        counts.append(at)
    return counts


def token_counts(tokens: int) -> list[int]:
    """The numbers of tokens that graphs of steps with prompts are captured for."""
    if not tokens:
        return []
    return [length for length in (*PREFILL_BUCKETS, *_MORE_LENGTHS) if length <= tokens]
