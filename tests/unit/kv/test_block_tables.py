"""Block tables hold what plans say, and lead each token to its own cell."""

from __future__ import annotations

import torch

from dsserve.core.step_plan import Segment, StepPlan
from dsserve.kv.block_tables import BlockTables


def make(rows: int = 2, tokens: int = 10, page: int = 4) -> BlockTables:
    return BlockTables(rows, tokens, page, torch.device("cpu"))


def test_plans_enter_pages_and_leave_the_rest() -> None:
    tables = make()
    assert tables.table.dtype == torch.int32 and tables.most_tokens == 12 and tables.padding == 2
    tables.update(StepPlan((Segment(0, 0, (1,) * 5, 0, (7, 3)), Segment(1, 0, (1,), 0, (5,)))))
    tables.update(StepPlan((Segment(1, 1, (1,)), Segment(0, 5, (1,) * 4, 2, (9,)))))
    assert tables.table.tolist() == [[7, 3, 9], [5, 0, 0], [0, 0, 0]]
    tables.update(StepPlan((Segment(0, 0, (1,), 0, (2,)),)))  # another text: what lies behind is not read
    assert tables.table[0].tolist() == [2, 3, 9]


def test_cells_are_places_in_pages() -> None:
    tables = make()
    tables.update(StepPlan((Segment(0, 0, (1,) * 5, 0, (7, 3)),)))
    rows, positions = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 3, 4, 6])
    assert tables.cells(rows, positions).tolist() == [28, 31, 12, 2], "padding goes to page 0"
    assert tables.cells(torch.tensor([[0]]), torch.arange(5)[None]).tolist() == [[28, 29, 30, 31, 12]]
