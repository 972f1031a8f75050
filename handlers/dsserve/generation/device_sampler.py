"""Chooses tokens as `sampler.choose` does, on a GPU: `device_draw` in one CUDA graph for each number of rows.

Every choice is the one of `sampler.choose`, for the same numbers of the same streams. Rows that `device_draw` leaves to
the host go through the sampler's own path, and so does nothing else: a step copies its numbers to the device once and
its tokens back once, and neither waits for what is queued there. Edits of logits are made before the graph, in its
input. Rank 0's alone; does not report probabilities.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from functools import partial

import torch

from dsserve.generation.cuda_graphs import buckets, capture
from dsserve.generation.device_draw import ROW_NUMBERS, draw, is_ruled
from dsserve.generation.pinned import Readback, stage
from dsserve.generation.sampler import SamplingState, edit_in_place, next_uniforms
from dsserve.generation.sampler import draw as draw_on_host

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Captured:
    """One graph and the tokens `[rows]` that it writes; it reads the sampler's own tensors."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor


class DeviceChoice:
    """See `choice.Choice`: tokens chosen on the device.

    Args:
        found: `[n]`, int64; negative where the host must choose.
        logits: `[n, V]`, edited, as they are still when the tokens are read.
        uniforms: the number that each row's stream gave; a greedy one's means nothing.
    """

    def __init__(
        self, found: torch.Tensor, logits: torch.Tensor, states: list[SamplingState], uniforms: list[float]
    ) -> None:
        self.tokens = found.clamp(min=0)  # a copy: the next replay of the graph overwrites what it found
        self.revised = False
        self._found = Readback(found)
        self._logits = logits
        self._states = states
        self._uniforms = uniforms

    @torch.inference_mode()
    def read(self) -> list[int]:
        """See `Choice`."""
        tokens = self._found.read()
        left = [row for row, token in enumerate(tokens) if token < 0]
        if left:
            self.revised = True
            states, uniforms = [self._states[row] for row in left], [self._uniforms[row] for row in left]
            drawn = draw_on_host(self._logits[left].float(), states, uniforms)
            for row, token in zip(left, drawn, strict=True):
                tokens[row] = token
        return tokens

    def take_back(self) -> None:
        """See `Choice`."""
        for state, uniform in zip(self._states, self._uniforms, strict=True):
            if not state.is_greedy:
                state.uniforms.put_back(uniform)


class DeviceSampler:
    """What chooses the tokens of one engine's steps.

    Args:
        slots: most rows of a step.
        vocabulary: width of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        # Both are written again for the next step, in the device's order: what a choice needs later is not among them,
        # but for logits that were edited.
        self._logits = torch.zeros(slots, vocabulary, device=device)
        self._numbers = torch.zeros(slots, 1 + ROW_NUMBERS, dtype=torch.float64, device=device)
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
    def launch(self, logits: torch.Tensor, states: list[SamplingState]) -> DeviceChoice:
        """Chooses the next token of each row of `logits` `[n, V]`, of any float dtype, without waiting for the device;
        leaves them as they are.

        Where some row's logits are edited, the choice must be read before the next one is launched.
        """
        if all(state.is_plain for state in states):
            return DeviceChoice(logits.argmax(dim=-1), logits, states, [0.0] * len(states))
        uniforms = next_uniforms(states)
        rows = self._logits[: len(states)]
        rows.copy_(logits)
        if all(state.is_unedited for state in states):
            return DeviceChoice(self._draw(states, uniforms), logits, states, uniforms)
        edit_in_place(rows, states)
        return DeviceChoice(self._draw(states, uniforms), rows, states, uniforms)

    def _draw(self, states: list[SamplingState], uniforms: list[float]) -> torch.Tensor:
        """The tokens of the first rows of `self._logits`, -1 for those that are left to the host."""
        count = len(states)
        rows = next(bucket for bucket in self._rows if bucket >= count)
        numbers = [(uniform, *state.numbers) for uniform, state in zip(uniforms, states, strict=True)]
        self._numbers[:count].copy_(stage(numbers, torch.float64, self._device), non_blocking=True)
        with_rules = any(is_ruled(state.numbers) for state in states)
        captured = self._captured.get((rows, with_rules))
        if captured is None:
            return draw(self._logits[:count], self._numbers[:count], with_rules)
        captured.graph.replay()
        return captured.tokens[:count]
