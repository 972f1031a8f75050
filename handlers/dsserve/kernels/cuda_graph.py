"""Captures one function as a CUDA graph; the sizes that graphs are captured for.

Does not know what is captured (`runner`, `sampling`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from dsserve.core.errors import LoadError, first_line


def capture(
    run: Callable[[], torch.Tensor], pool: object, device: torch.device
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of `run`, and the tensor that each replay fills.

    Raises:
        LoadError: the model does something that a graph cannot hold.
        torch.OutOfMemoryError: there is no memory for it.
    """
    graph = torch.cuda.CUDAGraph()
    stream = _warm_up_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):  # libraries make their handles and workspaces outside the graph
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
            return graph, run()
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except RuntimeError as error:
        raise LoadError(
            f"model or sampler cannot be captured as a CUDA graph ({first_line(error)}); set handler.cuda_graphs: false"
        ) from None


@cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for each stream that it was used on (torch: 32 MiB on Hopper), and
    torch hands out 32 of them."""
    return torch.cuda.Stream(device)


def buckets(first: int, last: int) -> list[int]:
    """`first`, doubled until `last`, which is always one of them."""
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == last else [*sizes, last]
