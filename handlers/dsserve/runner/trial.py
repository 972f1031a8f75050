"""Texts that are computed step by step without a scheduler: self-checks, warm-up, benchmarks and tests.

Each row has pages of its own, one behind the other; all ranks call alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsserve.core.step_plan import Segment, StepPlan, Wanted
from dsserve.runner.base import Runner, StepLogits, execute_at_load

# (row, tokens)
Part = tuple[int, Sequence[int]]


class Trial:
    """Rows of texts, of which each step computes some tokens more. A row has as many pages as its text needs."""

    def __init__(self, runner: Runner, page_tokens: int) -> None:
        self._runner = runner
        self._page_tokens = page_tokens
        self._lengths: dict[int, int] = {}
        self._taken = 0  # pages; page 0 is nobody's

    def step(
        self, *parts: Part, wanted: int = Wanted.NEXT, sources: Sequence[int] = (), chosen: torch.Tensor | None = None
    ) -> StepLogits:
        """Computes the next tokens of some rows, those of one token first.

        Args:
            sources: for each part the place of its token in what the step before chose; none = the tokens are known.
            chosen: these tokens, on rank 0.

        Raises:
            LoadError: there is no memory for it.
        """
        segments = [
            self._segment(row, tuple(tokens), wanted, sources[place] if sources else -1)
            for place, (row, tokens) in enumerate(parts)
        ]
        found = execute_at_load(self._runner, StepPlan(tuple(segments)), chosen)
        assert found is not None, "a step of some tokens has logits"
        return found

    def _segment(self, row: int, tokens: tuple[int, ...], wanted: int, source: int) -> Segment:
        start = self._lengths.get(row, 0)
        end = self._lengths[row] = start + len(tokens)
        has, needs = (-(-length // self._page_tokens) for length in (start, end))
        blocks = tuple(range(self._taken + 1, self._taken + 1 + needs - has))
        self._taken += len(blocks)
        return Segment(row, start, tokens, has, blocks, wanted, source)

    def logits(self, *parts: Part) -> torch.Tensor:
        """`[n, V]`, of the last token of each part."""
        return self.step(*parts).next

    def clear(self) -> None:
        """The rows are empty again."""
        self._lengths.clear()
        self._taken = 0
