"""What is proven and paid for before the first request: the engine's logits, and the first call of each shape.

Runs on all ranks alike, without plans from rank 0. Measures nothing that is reported as speed.
"""

from __future__ import annotations

import logging
import time

import torch

from dsserve.distributed import count_all_reduces
from dsserve.generation.model_runner import PREFILL_BUCKETS, ModelRunner
from dsserve.generation.plan import Plan
from dsserve.self_check import SelfCheck

logger = logging.getLogger(__name__)

# Two rows of different length side by side, so that ragged decoding is part of the check.
_FIRST_LENGTHS = (5, 12)


def verify_runner(runner: ModelRunner, check: SelfCheck) -> float:
    """Prefills and decodes the self-check's tokens under teacher forcing, in two ragged rows; returns the error.

    Raises:
        LoadError: the logits are not the unsharded model's: the architecture does not fit this engine.
    """
    tokens = check.token_ids.tolist()
    lengths = _FIRST_LENGTHS[: min(len(_FIRST_LENGTHS), runner.slots)]
    rows = [[logits] for length in lengths for logits in runner.execute(Plan(admit=(tuple(tokens[:length]),))).prefill]
    for step in range(len(tokens) - max(lengths)):
        plan = Plan(tokens=tuple(tokens[length + step] for length in lengths))
        for row, logits in zip(rows, runner.execute(plan).decode_rows(), strict=True):
            row.append(logits)
    _clear(runner)
    worst = 0.0
    for length, row in zip(lengths, rows, strict=True):
        last = length + len(row) - 1
        part = SelfCheck(check.token_ids[:last], check.logits[:last], check.dtype)
        worst = max(worst, part.verify(torch.stack(row), "the engine (KV slots, packed weights)"))
    return worst


def warm_up(runner: ModelRunner, is_leader: bool) -> int:
    """Runs every prefill bucket and every number of rows once; returns the all-reduces of one decode step."""
    started = time.perf_counter()
    longest = runner.max_model_len - 1
    buckets = [bucket for bucket in PREFILL_BUCKETS if bucket <= longest] or [1]
    for bucket in buckets:
        runner.execute(Plan(admit=((0,) * bucket,)))
        runner.execute(Plan(evict=(0,)))
    all_reduces = 0
    for live in range(1, runner.slots + 1):
        runner.execute(Plan(admit=((0,),)))
        with count_all_reduces() as count:
            runner.execute(Plan(tokens=(0,) * live))
        all_reduces = count[0]
        if is_leader and live in (1, runner.slots):
            seconds = time.perf_counter() - started
            logger.info("[dsserve] warm-up: %d of %d decode shapes, %.1f s", live, runner.slots, seconds)
    _clear(runner)
    return all_reduces


def _clear(runner: ModelRunner) -> None:
    runner.execute(Plan(evict=tuple(reversed(range(runner.live)))))
