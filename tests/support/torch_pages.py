"""What the Triton kernels over pages compute, by torch on a CPU, and a stand-in for CUDA graphs: steps as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from dsserve.attention.triton_pages import TritonAttention, TritonMeta
from dsserve.runner import step_graphs
from dsserve.runner.autotp import ModelRunner
from dsserve.sampling import gpu_sampler

CPU = torch.device("cpu")


class TorchPages(TritonAttention):
    """Takes everything from the tensors of the meta and the block tables, as the kernels do."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        meta: TritonMeta,
    ) -> torch.Tensor:
        rows, lengths = meta.rows.tolist(), meta.lengths.tolist()
        starts = list(range(len(rows) + 1)) if meta.starts is None else meta.starts.tolist()
        out = query.new_zeros(query.shape[2], query.shape[1], values.shape[-1])
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            begin, end = starts[number], starts[number + 1]
            if begin == end:
                continue
            cells = self._tables.cells(torch.tensor(row), torch.arange(length))
            own = (tensor[:, :, cells] for tensor in (keys, values))
            seen = torch.ones(end - begin, length, dtype=torch.bool).tril(length - (end - begin))
            part = scaled_dot_product_attention(query[:, :, begin:end], *own, seen, scale=scale, enable_gqa=True)
            out[begin:end] = part[0].transpose(0, 1)
        return out


class Graph:
    """In a CUDA graph's place: computes the same on the same tensors. The graphs share memory: after one's replay the
    others' outputs hold anything."""

    captured: ClassVar[list[Graph]] = []
    replays = 0

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run
        self.out = run()
        Graph.captured.append(self)

    def replay(self) -> None:
        Graph.replays += 1
        found = self._run().clone()
        for graph in Graph.captured:
            graph.out.fill_(3)
        self.out.copy_(found)


def fake_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what is captured is run again. Some texts are long, so that graphs of both kinds run."""

    def capture(run: Callable[[], torch.Tensor], *_: Any) -> tuple[Graph, torch.Tensor]:
        graph = Graph(run)
        return graph, graph.out

    Graph.captured.clear()
    Graph.replays = 0
    for module in (step_graphs, gpu_sampler):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(step_graphs, "LONG", 20)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def use_torch_pages(runner: ModelRunner) -> None:
    """Attention as on a GPU."""
    runner._forward._triton = TorchPages(runner._tables, CPU)  # type: ignore[union-attr]
    assert runner.is_packed


def use_graphs(runner: ModelRunner, tokens: int) -> None:
    """Steps as on a GPU, after `fake_capture`."""
    use_torch_pages(runner)
    runner.capture_graphs(False, tokens)
