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

# Two prompts of different length, read in one pass and then side by side, so that packed prefill and ragged decoding
# are part of the check.
_FIRST_LENGTHS = (5, 12)


def verify_runner(runner: ModelRunner, check: SelfCheck) -> float:
    """Prefills and decodes the self-check's tokens under teacher forcing, in two ragged rows; returns the error.

    Raises:
        LoadError: the logits are not the unsharded model's: the architecture does not fit this engine.
    """
    tokens = check.token_ids.tolist()
    lengths = _FIRST_LENGTHS[: min(len(_FIRST_LENGTHS), runner.slots)]
    steps = [runner.execute(Plan(admit=tuple(tuple(tokens[:length]) for length in lengths)))]
    for step in range(len(tokens) - max(lengths)):
        steps.append(runner.execute(Plan(tokens=tuple(tokens[length + step] for length in lengths))))
    rows = torch.stack([logits for logits in steps if logits is not None], dim=1)  # [rows, steps, V]
    _clear(runner)
    worst = 0.0
    for length, row in zip(lengths, rows, strict=True):
        last = length + row.shape[0] - 1
        part = SelfCheck(check.token_ids[:last], check.logits[:last], check.dtype)
        worst = max(worst, part.verify(row, "the engine (KV slots, packed weights)"))
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
