"""Each row's pages as a tensor, on every rank: how a pass finds the cells of its tokens.

Rank 0 decides (`kv.manager`), plans say what changes. Costs a step what it changes, however long the texts are.
"""

from __future__ import annotations

import numpy as np
import torch

from dsserve.core.step_plan import StepPlan
from dsserve.kernels.host_copy import move


class BlockTables:
    """The field's block tables.

    Args:
        rows: of texts; one more, the last, is the padding's: all of its pages are page 0, which no text holds.
        max_tokens: of a text.
        page_tokens: of a page.

    Attributes:
        table: `[rows + 1, pages of the longest text]`, int32, on the device.
        padding: the padding's row.
        most_tokens: that a row has room for.
    """

    def __init__(self, rows: int, max_tokens: int, page_tokens: int, device: torch.device) -> None:
        self.page_tokens = page_tokens
        self.padding = rows
        self._device = device
        pages = -(-max_tokens // page_tokens)
        self.most_tokens = pages * page_tokens
        self.table = torch.zeros(rows + 1, pages, dtype=torch.int32, device=device)

    def update(self, plan: StepPlan) -> None:
        """Enters the pages that rows get in this step."""
        changes = [
            (segment.row, segment.first_block + place, page)
            for segment in plan.segments
            if segment.blocks
            for place, page in enumerate(segment.blocks)
        ]
        if changes:
            rows, places, pages = move(np.array(changes), self._device).unbind(1)
            self.table[rows, places] = pages.to(torch.int32)

    def cells(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where tokens lie: rows and positions, int64, of one shape -> cells, int64."""
        pages = self.table[rows, positions // self.page_tokens].long()
        return pages * self.page_tokens + positions % self.page_tokens
