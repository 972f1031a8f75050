"""Chooses tokens as `sampler.choose` does, on a GPU: `gpu_draw` in one CUDA graph for each number of rows.

Every choice is the one of `sampler.choose`, for the same numbers of the same streams. Rows that `gpu_draw` leaves to
the host go through the sampler's own path, and so does nothing else: a step copies its numbers to the device once and
its tokens back once, and neither waits for what is queued there. Edits of logits are made before the graph, in its
input. Rank 0's alone; does not report probabilities.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dsserve.kernels.cuda_graph import buckets, capture
from dsserve.kernels.host_copy import Readback, stage
from dsserve.sampling.faults import Fault, attempt
from dsserve.sampling.gpu_draw import ROW_NUMBERS, draw, is_ruled
from dsserve.sampling.sampler import SamplingState, choose_edited, edit_in_place, likeliest, note, settle, take_uniforms

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
        raw: `[n, V]`, the model's own logits.
        edited: `[n, V]`, as they are still when the tokens are read.
        uniforms: the number that each row's stream gave; a greedy one's means nothing, and a row may lack it.
        faults: of rows that failed before anything could be chosen; their states hear of it when the tokens are read.
    """

    def __init__(
        self,
        found: torch.Tensor,
        raw: torch.Tensor,
        edited: torch.Tensor,
        states: list[SamplingState],
        uniforms: dict[int, float],
        faults: dict[int, Fault],
    ) -> None:
        self.tokens = found.clamp(min=0)  # a copy: the next replay of the graph overwrites what it found
        self.revised: list[int] = []
        self._found = Readback(found)
        self._raw = raw
        self._edited = edited
        self._states = states
        self._uniforms = uniforms
        self._faults = faults

    @torch.inference_mode()
    def read(self) -> list[int]:
        """See `Choice`."""
        tokens = self._found.read()
        note(self._faults, self._states)
        left = [row for row, token in enumerate(tokens) if token < 0 and row not in self._faults]
        self.revised = left
        if left:
            self._choose_on_host(left, tokens)
        return tokens

    def _choose_on_host(self, left: list[int], tokens: list[int]) -> None:
        """Enters the tokens of these rows."""

        def choose_some(part: range) -> None:
            rows = left[part.start : part.stop]
            states = [self._states[row] for row in rows]
            uniforms = [self._uniforms[row] for row in rows]
            found = choose_edited(self._edited[rows].float(), states, uniforms)
            for row, token in zip(rows, settle(found, [self._raw[row] for row in rows], states), strict=True):
                tokens[row] = token

        note(attempt(range(len(left)), choose_some), [self._states[row] for row in left])

    def take_back(self, rows: Sequence[int]) -> None:
        """See `Choice`."""
        for row in rows:
            if row in self._uniforms and not self._states[row].is_greedy:
                self._states[row].uniforms.put_back(self._uniforms[row])


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
            LoadError: see `runner.decode_graphs.capture`.
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
        uniforms, faults = dict[int, float](), dict[int, Fault]()
        if all(state.is_plain for state in states):
            uniforms = dict.fromkeys(range(len(states)), 0.0)
            return DeviceChoice(likeliest(logits), logits, logits, states, uniforms, faults)
        rows = self._logits[: len(states)]
        edited = logits if all(state.is_unedited for state in states) else rows

        def prepare(some: range) -> None:
            take_uniforms(some, states, uniforms)
            part = rows[some.start : some.stop]
            part.copy_(logits[some.start : some.stop])
            if edited is rows:
                edit_in_place(part, states[some.start : some.stop])

        faults = attempt(range(len(states)), prepare)
        return DeviceChoice(self._find(states, uniforms), logits, edited, states, uniforms, faults)

    def _find(self, states: list[SamplingState], uniforms: dict[int, float]) -> torch.Tensor:
        """What `_draw` gives; where that raises, all rows are left to the host, which finds the guilty one."""
        try:
            return self._draw(states, uniforms)
        except BaseException as error:
            logger.error("[dsserve] %s: the host chooses this step's tokens", Fault.of(error).cause)
            return torch.full((len(states),), -1, device=self._device)

    def _draw(self, states: list[SamplingState], uniforms: dict[int, float]) -> torch.Tensor:
        """The tokens of the first rows of `self._logits`, -1 for those that are left to the host."""
        count = len(states)
        rows = next(bucket for bucket in self._rows if bucket >= count)
        numbers = [(uniforms.get(row, 0.0), *state.numbers) for row, state in enumerate(states)]
        self._numbers[:count].copy_(stage(numbers, torch.float64, self._device), non_blocking=True)
        with_rules = any(is_ruled(state.numbers) for state in states)
        captured = self._captured.get((rows, with_rules))
        if captured is None:
            return draw(self._logits[:count], self._numbers[:count], with_rules)
        captured.graph.replay()
        return captured.tokens[:count]
