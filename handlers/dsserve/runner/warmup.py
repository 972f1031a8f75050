"""What is proven and paid for before the first request: the engine's logits, and the first call of each shape.

Runs on all ranks alike, without plans from rank 0. Measures nothing that is reported as speed.
"""

from __future__ import annotations

import logging
import time

import torch

from dsserve.core.step_plan import Admission, Plan
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.collectives import count_all_reduces
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.base import Runner, prefill_at_load
from dsserve.runner.prefill_batch import PREFILL_BUCKETS

logger = logging.getLogger(__name__)

# Two prompts of different length, read in one pass and then side by side, so that packed prefill and ragged decoding
# are part of the check. Then again with the second one's beginning taken from the first one's row.
_FIRST_LENGTHS = (5, 12)
_SHARED = 3


def verify_runner(runner: ModelRunner, check: SelfCheck) -> float:
    """Prefills and decodes the self-check's tokens under teacher forcing, in two ragged rows; returns the error.

    Raises:
        LoadError: the logits are not the unsharded model's: the architecture does not fit this engine.
    """
    tokens = tuple(check.token_ids.tolist())
    lengths = _FIRST_LENGTHS[: min(len(_FIRST_LENGTHS), runner.slots)]
    prompts = tuple(Admission(tokens[:length]) for length in lengths)
    worst = _teacher_force(runner, check, [Plan(admit=prompts)], lengths)
    if len(lengths) > 1:
        continued = Admission(tokens[_SHARED : lengths[1]], source=0, shared=_SHARED)
        plans = [Plan(admit=prompts[:1]), Plan(admit=(continued,))]
        worst = max(worst, _teacher_force(runner, check, plans, lengths))
    return worst


def _teacher_force(runner: ModelRunner, check: SelfCheck, admit: list[Plan], lengths: tuple[int, ...]) -> float:
    """Admits the check's first tokens as rows of these lengths, decodes the rest; returns a row's largest error."""
    tokens = check.token_ids.tolist()
    first = [step.next for plan in admit if (step := prefill_at_load(runner, plan)) is not None]
    steps = [torch.cat(first)]
    for at in range(len(tokens) - max(lengths)):
        step = runner.execute(Plan(tokens=tuple(tokens[length + at] for length in lengths)))
        if step is not None:
            steps.append(step.next)
    rows = torch.stack(steps, dim=1)  # [rows, steps, V]
    _clear(runner)
    worst = 0.0
    for length, row in zip(lengths, rows, strict=True):
        last = length + row.shape[0] - 1
        worst = max(worst, check.until(last).verify(row, "the engine (KV slots, packed weights)"))
    return worst


def warm_up(runner: ModelRunner, is_leader: bool, most: int) -> int:
    """Runs every prefill bucket and every number of rows up to `most` once; returns the all-reduces of one decode
    step."""
    started = time.perf_counter()
    longest = runner.max_model_len - 1
    buckets = [bucket for bucket in PREFILL_BUCKETS if bucket <= longest] or [1]
    for bucket in buckets:
        prefill_at_load(runner, Plan(admit=(Admission((0,) * bucket),)))
        runner.execute(Plan(evict=(0,)))
    all_reduces = 0
    for live in range(1, most + 1):
        prefill_at_load(runner, Plan(admit=(Admission((0,)),)))
        with count_all_reduces() as count:
            runner.execute(Plan(tokens=(0,) * live))
        if live == 1:
            runner.execute(Plan(tokens=(0,), ahead=True))  # the first broadcast of a device's tokens is slower
        all_reduces = count[0]
        if is_leader and live in (1, most):
            seconds = time.perf_counter() - started
            logger.info("[dsserve] warm-up: %d of %d decode shapes, %.1f s", live, most, seconds)
    _clear(runner)
    return all_reduces


def warm_up_batches(runner: Runner, is_leader: bool) -> None:
    """One prompt, then the largest batch of the longest prompts, and a step of each. Later batches need no more memory.

    For runners whose rows begin together (`KernelRunner`).
    """
    started = time.perf_counter()
    for rows, length in ((1, 1), (runner.slots, runner.max_model_len - 1)):
        prefill_at_load(runner, Plan(admit=(Admission((0,) * length),) * rows))
        runner.execute(Plan(tokens=(0,) * rows))
        _clear(runner)
        if is_leader:
            logger.info("[dsserve] warm-up: %d x %d tokens, %.1f s", rows, length, time.perf_counter() - started)


def _clear(runner: Runner) -> None:
    runner.execute(Plan(evict=tuple(reversed(range(runner.live)))))
