"""Chooses tokens as `sampler.choose` does, on a GPU: `device_draw` in one CUDA graph for each number of rows.

Every choice is the one of `sampler.choose`, for the same numbers of the same streams. Rows that `device_draw` leaves to
the host go through the sampler's own path, and so does nothing else: a step copies its numbers to the device once and
its tokens back once. Edits of logits are made before the graph, in its input. Rank 0's alone; does not report
probabilities.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from functools import partial

import torch

from dsserve.generation.cuda_graphs import buckets, capture
from dsserve.generation.device_draw import ROW_NUMBERS, draw, is_ruled
from dsserve.generation.sampler import SamplingState, choose_greedily, edit_in_place, next_uniforms
from dsserve.generation.sampler import draw as draw_on_host

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Captured:
    """One graph and the tokens `[rows]` that it writes; it reads the sampler's own tensors."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor


class DeviceSampler:
    """What chooses the tokens of one engine's steps.

    Args:
        slots: most rows of a step.
        vocabulary: width of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._logits = torch.zeros(slots, vocabulary, device=device)
        self._numbers = torch.zeros(slots, 1 + ROW_NUMBERS, dtype=torch.float64, device=device)
        # Pinned, so that the copy waits for nothing. It has ended when the step's tokens are here.
        self._on_host = torch.zeros(slots, 1 + ROW_NUMBERS, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._rows = buckets(1, slots)
        self._captured: dict[tuple[int, bool], _Captured] = {}  # (rows, with rules)

    @torch.inference_mode()
    def capture(self, pool: object) -> None:
        """Chooses in CUDA graphs from now on: for each bucket of rows one with rules and one without.

        Args:
            pool: as `DecodeGraphs.capture` takes it.

        Raises:
            LoadError: see `cuda_graphs.capture`.
        """
        reserved = torch.cuda.memory_reserved(self._device)
        for rows, with_rules in itertools.product(reversed(self._rows), (True, False)):
            run = partial(draw, self._logits[:rows], self._numbers[:rows], with_rules)
            self._captured[rows, with_rules] = _Captured(*capture(run, pool, self._device))
        grown = (torch.cuda.memory_reserved(self._device) - reserved) / 2**30
        logger.info("[dsserve] CUDA graphs of the sampler: %d, %.2f GiB", len(self._captured), grown)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
        """The next token of each row of `logits` `[n, V]`, of any float dtype; leaves them as they are."""
        if all(state.is_plain for state in states):
            return choose_greedily(logits)
        uniforms = next_uniforms(states)
        rows = self._logits[: len(states)]
        rows.copy_(logits)
        edit_in_place(rows, states)
        tokens = self._draw(states, uniforms)
        left = [row for row, token in enumerate(tokens) if token < 0]
        if left:
            drawn = draw_on_host(rows[left], [states[row] for row in left], [uniforms[row] for row in left])
            for row, token in zip(left, drawn, strict=True):
                tokens[row] = token
        return tokens

    def _draw(self, states: list[SamplingState], uniforms: list[float]) -> list[int]:
        """The tokens of the first rows of `self._logits`, -1 for those that are left to the host."""
        count = len(states)
        rows = next(bucket for bucket in self._rows if bucket >= count)
        numbers = [(uniform, *state.numbers) for uniform, state in zip(uniforms, states, strict=True)]
        self._on_host[:count] = torch.tensor(numbers, dtype=torch.float64)
        self._numbers[:count].copy_(self._on_host[:count], non_blocking=True)
        with_rules = any(is_ruled(state.numbers) for state in states)
        captured = self._captured.get((rows, with_rules))
        if captured is None:
            return draw(self._logits[:count], self._numbers[:count], with_rules).tolist()
        captured.graph.replay()
        return captured.tokens[:count].tolist()
