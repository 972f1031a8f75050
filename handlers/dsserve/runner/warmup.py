"""What is proven and paid for before the first request: the engine's logits, and the first call of each shape.

Runs on all ranks alike, without plans from rank 0. Measures nothing that is reported as speed.
"""

from __future__ import annotations

import logging
import time

import torch

from dsserve.core.step_input import PREFILL_BUCKETS
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.collectives import count_all_reduces
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.kernel_injection import KernelRunner

logger = logging.getLogger(__name__)

# Two prompts of different length, read in one pass and then side by side, so that packed prompts and ragged decoding
# are part of the check. Then again with the second one read in two parts, beside the first one.
_FIRST_LENGTHS = (5, 12)
_PART = 3


def verify_runner(runner: ModelRunner, check: SelfCheck) -> float:
    """Reads and decodes the self-check's tokens under teacher forcing, in two ragged rows; returns the error.

    Raises:
        LoadError: the logits are not the unsharded model's: the architecture does not fit this engine.
    """
    tokens = check.token_ids.tolist()
    lengths = _FIRST_LENGTHS[: min(len(_FIRST_LENGTHS), runner.rows)]
    worst = 0.0
    for in_parts in (False, True)[: len(lengths)]:
        for length, row in zip(lengths, _teacher_force(runner, tokens, lengths, in_parts), strict=True):
            known = check.until(length + row.shape[0] - 1)
            worst = max(worst, known.verify(row, "the engine (KV pages, packed weights)"))
    return worst


def _teacher_force(runner: ModelRunner, tokens: list[int], lengths: tuple[int, ...], in_parts: bool) -> torch.Tensor:
    """Reads the first tokens as rows of these lengths and decodes the rest: logits `[rows, steps, V]`.

    Args:
        in_parts: the last row's first tokens are read alone, the rest of its prompt beside the others.
    """
    trial, begun = runner.trial(), [0] * len(lengths)
    if in_parts:
        begun[-1] = _PART
        trial.step((len(lengths) - 1, tokens[:_PART]))
    steps = [trial.logits(*((row, tokens[begun[row] : length]) for row, length in enumerate(lengths)))]
    for at in range(len(tokens) - max(lengths)):
        steps.append(
            trial.logits(*((row, tokens[length + at : length + at + 1]) for row, length in enumerate(lengths)))
        )
    return torch.stack(steps, dim=1)


def warm_up(runner: ModelRunner, is_leader: bool, most: int) -> int:
    """Runs every length of a pass that reads prompts, up to the first ones, and every number of rows up to `most` once;
    returns the all-reduces of one decode step."""
    started = time.perf_counter()
    trial = runner.trial()
    for bucket in [bucket for bucket in PREFILL_BUCKETS if bucket < runner.max_model_len] or [1]:
        trial.step((0, (0,) * bucket))
        trial.clear()
    all_reduces = 0
    for live in range(1, most + 1):
        trial.step((live - 1, (0,)))
        with count_all_reduces() as count:
            trial.step(*((row, (0,)) for row in range(live)))
        if live == 1:  # the first broadcast of a device's tokens is slower
            trial.step((0, (0,)), sources=(0,), chosen=torch.zeros(1, dtype=torch.int64, device=runner.device))
        all_reduces = count[0]
        if is_leader and live in (1, most):
            seconds = time.perf_counter() - started
            logger.info("[dsserve] warm-up: %d of %d decode shapes, %.1f s", live, most, seconds)
    return all_reduces


def warm_up_batches(runner: KernelRunner, is_leader: bool) -> None:
    """One prompt, then the largest batch of the longest prompts, and a step of each. Later batches need no more memory.

    For runners whose rows begin together.
    """
    started = time.perf_counter()
    for rows, length in ((1, 1), (runner.rows, runner.max_model_len - 1)):
        trial = runner.trial()
        trial.step(*((row, (0,) * length) for row in range(rows)))
        trial.step(*((row, (0,)) for row in range(rows)))
        if is_leader:
            logger.info("[dsserve] warm-up: %d x %d tokens, %.1f s", rows, length, time.perf_counter() - started)
