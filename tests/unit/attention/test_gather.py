"""Attention over pages by torch and by C++ against plain causal attention of each text on its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from dsserve.attention import gather
from dsserve.attention.backend import read_cells
from dsserve.attention.gather import GatherAttention
from dsserve.core.step_input import StepInput
from dsserve.core.step_plan import Segment, StepPlan
from dsserve.kernels.cpu_ops import load_cpu_ops
from dsserve.kv.block_tables import BlockTables

CPU, PAGE, HEADS, KV, DIM = torch.device("cpu"), 4, 6, 2, 8
SCALE = 0.3


def op(name: str) -> Any:
    if name == "C++" and not load_cpu_ops():
        pytest.skip("g++ or ninja is missing: the operations are not used")
    return torch.ops.dsserve_cpu.paged_attention if name == "C++" else None


def attend(parts: list[tuple[int, int]], padding: int, paged_op: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backend gives for segments (start, size), and what each text's own attention gives: `[T, H, D]`."""
    generator = torch.Generator().manual_seed(len(parts) + padding)
    parts = sorted(parts, key=lambda part: part[1] > 1)
    tables = BlockTables(len(parts), 64, PAGE, CPU)
    order = (torch.randperm(len(parts) * 16, generator=generator) + 1).tolist()
    segments, texts = [], []
    cells = torch.full((2, (len(order) + 1) * PAGE, KV, DIM), 7.0)  # what lies elsewhere changes nothing
    for row, (start, size) in enumerate(parts):
        pages = tuple(order.pop() for _ in range(-(-(start + size) // PAGE)))
        segments.append(Segment(row, start, (0,) * size, 0, pages))
        texts.append(torch.randn(2, start + size, KV, DIM, generator=generator))
    plan = StepPlan(tuple(segments))
    tables.update(plan)
    step = StepInput.of(plan)
    for row, text in enumerate(texts):
        cells[:, tables.cells(torch.tensor(row), torch.arange(text.shape[1]))] = text
    query = torch.randn(1, HEADS, step.total + padding, DIM, generator=generator)
    fresh = [torch.cat([text[kind] for text in texts]).transpose(0, 1)[None] for kind in range(2)]
    backend = GatherAttention(tables, CPU)
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // KV, training=False, is_causal=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_paged_op", lambda device: paged_op)
        meta = backend.describe(step)
        assert bool(meta.runs) == step.fresh
        if step.fresh:
            keys, values = (torch.nn.functional.pad(tensor, (0, 0, 0, padding)) for tensor in fresh)
        else:
            keys, values = read_cells(cells[0]), read_cells(cells[1])
        found = backend.attend(module, query, keys, values, SCALE, meta)
    expected = torch.zeros_like(found)
    for (begin, end), text in zip(zip(step.starts, step.starts[1:], strict=False), texts, strict=True):
        size, length = int(end - begin), text.shape[1]
        seen = torch.ones(size, length, dtype=torch.bool).tril(length - size)
        own = (text[kind].transpose(0, 1)[None] for kind in range(2))
        part = scaled_dot_product_attention(query[:, :, begin:end], *own, seen, scale=SCALE, enable_gqa=True)
        expected[begin:end] = part[0].transpose(0, 1)
    assert found.shape == (step.total + padding, HEADS, DIM)
    return found, expected


KINDS = {
    "fresh": [(0, 7), (0, 7), (0, 1), (0, 19), (0, 4)],
    "parts": [(16, 5), (3, 30), (1, 2)],
    "decoded": [(0, 1), (5, 1), (31, 1), (63, 1)],
    "mixed": [(9, 1), (0, 1), (12, 8), (0, 11)],
}


@pytest.mark.parametrize("paged_op", ["torch", "C++"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_each_text_sees_itself(kind: str, padding: int, paged_op: str) -> None:
    found, expected = attend(KINDS[kind], padding, op(paged_op))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


parts = st.integers(0, 50).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, 64 - start)))


@settings(max_examples=60, deadline=None)
@given(st.lists(parts, min_size=1, max_size=5), st.integers(0, 9), st.sampled_from(["torch", "C++"]))
def test_whatever_comes_together(found: list[tuple[int, int]], padding: int, paged_op: str) -> None:
    torch.testing.assert_close(*attend(found, padding, op(paged_op)), rtol=1e-5, atol=1e-5)
