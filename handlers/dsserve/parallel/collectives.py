"""Sums and minima over the ranks, and how many sums a block of code makes.

Starts no process group (`process_group`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from dsserve.parallel.rank import RankInfo


def agree_on_least(value: int, rank: RankInfo) -> int:
    """The smallest of the ranks' values, on all of them."""
    if rank.world_size == 1:
        return value
    values = torch.tensor(value)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return int(values)


def uses_shared_memory() -> bool:
    """Whether DeepSpeed sums over shared memory. The operation may be loaded on a rank whose group uses gloo."""
    from deepspeed.comm import comm

    return getattr(comm.cdb, "shm_comm_op", None) is not None


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all ranks, in place, the way DeepSpeed's layers do. fp32, fp16 or bf16; on a GPU fp64 too."""
    if tensor.device.type == "cuda":  # what DeepSpeed calls in the end, in a form that torch.compile can follow
        torch.distributed.all_reduce(tensor)
        return tensor
    from deepspeed.comm import comm

    comm.cdb.inference_all_reduce(tensor, torch.distributed.ReduceOp.SUM)
    return tensor


@contextlib.contextmanager
def count_all_reduces() -> Any:
    """Counts the block's all-reduces, those of DeepSpeed's layers and ours: yields a list, the count at [0]."""
    from deepspeed.comm import comm

    counter = [0]
    with contextlib.ExitStack() as patches:
        # What `all_reduce` and DeepSpeed's layers call, on a CPU and on a GPU (where DeepSpeed calls torch's).
        for owner, name, device_type in (
            (comm.cdb, "inference_all_reduce", "cpu"), (torch.distributed, "all_reduce", "cuda")
        ):  # fmt: skip
            if hasattr(owner, name):
                patches.enter_context(_counted(owner, name, device_type, counter))
        yield counter


@contextlib.contextmanager
def _counted(owner: Any, name: str, device_type: str, counter: list[int]) -> Any:
    original: Callable[..., Any] = getattr(owner, name)

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counter[0] += tensor.device.type == device_type
        return original(tensor, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)
