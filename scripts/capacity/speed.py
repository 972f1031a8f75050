"""How fast one replica is: two straight lines through a benchmark's numbers.

A decode step takes longer with every row, a prefill with every prompt token. Not covered: contexts so long that the
KV cache's reads count (the benchmark's are short), prompts beyond one prefill, sampling's own cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STEPS_PER_CALL = 4
MAX_RUNNING = 16
MAX_WAITING = 64


class CapacityError(Exception):
    """The numbers given cannot be worked with; the message says what is missing."""


@dataclass(frozen=True)
class Speed:
    """One replica (a TP group) in milliseconds.

    Args:
        step_ms, row_ms: a decode step, and what each row adds.
        prefill_ms, prompt_token_ms: a pass over new prompts, and what each of their tokens adds.
        steps_per_call: tokens leave in groups of so many (see `dsserve.worker.call_length`).
        max_running, max_waiting: as in `handler:`; a replica that has both refuses.
    """

    step_ms: float
    row_ms: float
    prefill_ms: float
    prompt_token_ms: float
    steps_per_call: int = STEPS_PER_CALL
    max_running: int = MAX_RUNNING
    max_waiting: int = MAX_WAITING

    def decode_ms(self, rows: int) -> float:
        return self.step_ms + self.row_ms * rows if rows else 0.0

    def admit_ms(self, tokens: int) -> float:
        return self.prefill_ms + self.prompt_token_ms * tokens

    def most_requests_per_s(self, prompt_tokens: float, new_tokens: float) -> float:
        """With all rows busy all the time, each prompt prefilled alone: no load above it can be served."""
        a_request_ms = self.decode_ms(self.max_running) / self.max_running * new_tokens
        return 1e3 / (a_request_ms + self.admit_ms(int(prompt_tokens)))


def fit(report: dict[str, Any]) -> Speed:
    """From `scripts.bench`'s JSON (`http`) or `scripts.reliability.failover`'s (`alone`). Raises CapacityError."""
    numbers = {
        int(key): value for key, value in (report.get("http") or report.get("alone") or {}).items() if key.isdigit()
    }
    if len(numbers) < 2:
        raise CapacityError("the benchmark has no figures for two numbers of concurrent requests at least")
    prompt_tokens = int(report["setting"]["prompt_tokens"])
    rows = sorted(numbers)
    step_ms, row_ms = line(rows, [numbers[n]["inter_token_ms_median"] for n in rows])
    prefill_ms, token_ms = line([n * prompt_tokens for n in rows], [numbers[n]["first_token_ms_median"] for n in rows])
    return Speed(step_ms, row_ms, prefill_ms, token_ms)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least squares, neither part below zero: (value at 0, slope)."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread)
    start = mean_y - slope * mean_x
    if start >= 0:
        return start, slope
    return 0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)
