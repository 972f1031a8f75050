"""This process among torchrun's: its number, its device, its environment and its threads.

Starts no process group (`process_group`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsserve.core.errors import LoadError

_MOST_THREADS = 16  # of `many_cores`


@dataclass(frozen=True)
class RankInfo:
    """This process among torchrun's: numbers from its environment; a process without torchrun is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def from_env(cls) -> RankInfo:
        def read(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        world_size = read("WORLD_SIZE", 1)
        return cls(read("RANK", 0), read("LOCAL_RANK", 0), world_size, read("LOCAL_WORLD_SIZE", world_size))

    @property
    def is_leader(self) -> bool:
        return self.rank == 0


def select_device(device_type: str | None, rank: RankInfo) -> torch.device:
    """The rank's own device: `cuda:<local rank>`, or the CPU where there is no GPU or `deviceType: cpu` asks for it.

    Raises:
        LoadError: `deviceType: gpu` where fewer GPUs are visible than ranks run.
    """
    wants_cpu = device_type == "cpu" or os.environ.get("DS_ACCELERATOR") == "cpu"
    visible = 0 if wants_cpu else torch.cuda.device_count()
    if visible == 0 and device_type != "gpu":
        return torch.device("cpu")
    if visible < rank.local_world_size:
        raise LoadError(
            f"model-config.yaml: {rank.local_world_size} rank(s) need as many GPUs, {visible} visible; lower "
            "torchrun.nproc-per-node, or set deviceType: cpu"
        )
    return torch.device("cuda", rank.local_rank)


def prepare_environment(device: torch.device, rank: RankInfo, num_threads: int | None = None) -> None:
    """Sets what DeepSpeed and OpenMP read; must run before DeepSpeed is imported.

    LOCAL_SIZE: DeepSpeed's shared-memory all-reduce crashes unless it is the number of ranks, and torchrun sets only
    LOCAL_WORLD_SIZE.
    Weights: what DeepSpeed unpickles from .bin files may hold tensors only, no code.
    Threads: with more threads than cores the ranks' spinning all-reduce makes a step about 100 times slower. A rank
    with a GPU has little to do on the host, in small pieces, and with many threads waits for the slowest core each
    time: beside programs that used the cores a pass took 25 ms instead of 11 (64 cores, TP=1).
    Tokenizers: rank 0 reads one text at a time, which is not worth waking threads for.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["LOCAL_SIZE"] = str(rank.local_world_size)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(num_threads or max(1, cores // rank.local_world_size))
    else:
        torch.set_num_threads(num_threads or 1)
        torch.cuda.set_device(device)
        # TorchServe's base handler allows TF32, which is not fp32.
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def many_cores() -> Iterator[None]:
    """Within the block this rank computes with up to 16 cores: for what one rank does while the others wait.

    Do not use more threads than saturate memory bandwidth. With 64, one is always preempted and the rest wait. A
    reference of 13 GB took 0.5 s with 16 threads on a quiet machine, and 1 to 17 s with 64.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
