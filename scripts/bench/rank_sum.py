"""How long a sum over the ranks with its addition and norm takes, in the ranks' memory and over NCCL, by its size.

    torchrun --nproc-per-node 4 -m scripts.bench.rank_sum --width 4096

Every rank runs it; rank 0 prints microseconds a sum, in CUDA graphs as the engine's steps are. `peers` has its limits
from here. Nothing is compared: `tests/gpu/test_rank_sum.py` does that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import typer

from dsserve.parallel.process_group import init_process_group
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.parallel.rank_sum import RankSum
from dsserve.parallel.symmetric_memory import share_memory
from dsserve.worker.exit import finish_rank

A_GRAPH, REPLAYS = 32, 20
Sums = tuple[RankSum, RankSum]


def sum_all(sums: Sums, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """As many sums as a graph holds, one after the other, each of this rank's `part` `[rows, H]`."""
    for index in range(A_GRAPH):
        memory = sums[index % 2].take(len(part))
        sums[index % 2].add_norm(part if memory is None else memory, residual, weight, 1e-6)


def time_graph(function: Callable[[], None]) -> float:
    """Microseconds of one of the sums that `function` launches, in a CUDA graph: the median of its replays."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(REPLAYS):
        torch.distributed.barrier()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) * 1e3 / A_GRAPH)
    graph.reset()  # a process group whose collectives a graph holds is never destroyed
    return median(times)


def main(
    width: int = typer.Option(4096, help="H, values of a row (bf16)"),
    rows: str = typer.Option("1,8,32,64,128,256,512,1024,2048,4096", help="rows of a sum, with commas"),
) -> None:
    """Measure and print."""
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    torch.cuda.set_device(device)
    init_process_group(rank)
    counts = [int(word) for word in rows.split(",")]
    peers = share_memory(rank, max(counts), width, torch.bfloat16, device)
    ways: dict[str, Sums] = {"NCCL": (RankSum(rank.world_size, None),) * 2}
    if peers:
        ways["ranks' memory"] = (RankSum(rank.world_size, peers[0]), RankSum(rank.world_size, peers[1]))
    found: dict[str, list[float]] = {way: [] for way in ways}
    for count in counts:
        tensors = [
            torch.randn(*size, device=device, dtype=torch.bfloat16) for size in [(count, width)] * 2 + [(width,)]
        ]
        for way, sums in ways.items():
            found[way].append(time_graph(partial(sum_all, sums, *tensors)))
    if rank.is_leader:
        print(f"{rank.world_size} x {torch.cuda.get_device_name(device)}, width {width}, bf16: microseconds a sum")
        print(f"| KiB of a part | rows | {' | '.join(found)} |\n|{' --- |' * (2 + len(found))}")
        for index, count in enumerate(counts):
            cells = " | ".join(f"{times[index]:.1f}" for times in found.values())
            print(f"| {count * width * 2 // 1024} | {count} | {cells} |")
        print(json.dumps({"ranks": rank.world_size, "width": width, "rows": counts, "us": found}))
    torch.distributed.barrier()
    finish_rank()


if __name__ == "__main__":
    typer.run(main)
