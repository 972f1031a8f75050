"""Ranks, devices, the process group and its sum: what a rank must do before and beside DeepSpeed.

Prepares the environment that DeepSpeed reads when it is imported, starts the process group once, and removes the
shared-memory segments that DeepSpeed leaves. Does not shard anything (`ds_engine`) and decides nothing about
requests (`generation`).
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from dsserve.core.errors import LoadError, first_line

logger = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 600
# What DeepSpeed 0.19.8 maps for each rank: 2 small and 2 large buffers (csrc/cpu/comm/shm.cpp).
_SHM_SEGMENT_BYTES = 66 * 2**20
_SHM_OP = "deepspeed_shm_comm"
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


def end_rank(error: BaseException) -> None:
    """Ends this process at once, so that TorchServe fails the worker's requests and starts all ranks anew."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    # The message of an exception may hold a user's text: the type and the place are what can be logged.
    logger.critical("[dsserve] %s at %s:%d; ending the rank", type(error).__name__, where.filename, where.lineno or 0)
    logging.shutdown()
    os._exit(1)


def finish_rank() -> None:
    """Ends this process after its work, with exit code 0, and never comes back.

    Destroying a process group whose collectives a living CUDA graph holds never returns (NCCL 2.28), and an interpreter
    that simply ends may be aborted by the group's threads.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def init_process_group(rank: RankInfo) -> None:
    """Starts the process group and hands it to DeepSpeed, once. Without torchrun (one rank) there is none."""
    if rank.world_size == 1 or torch.distributed.is_initialized():
        return
    import deepspeed

    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    # CPU tensors (plans) travel over gloo also where the model's own travel over NCCL.
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    if on_cpu:
        _agree_on_shared_memory(rank)
    # DeepSpeed's op builder prints to stdout, which TorchServe parses.
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False)
    torch.distributed.barrier()
    _unlink_shared_memory(rank)


def _agree_on_shared_memory(rank: RankInfo) -> None:
    """Switches DeepSpeed's shared-memory all-reduce off on all ranks if one of them cannot have it."""
    import deepspeed

    reason = _first_reason(_why_no_shared_memory(rank), rank) or _first_reason(_why_not_built(), rank)
    if reason:
        deepspeed.ops.__compatible_ops__[_SHM_OP] = False
        if rank.is_leader:
            logger.warning("[dsserve] all-reduce over gloo, about 3 times slower: %s", reason)


def _first_reason(reason: str | None, rank: RankInfo) -> str | None:
    """The first rank's reason that has one, on all of them."""
    reasons: list[str | None] = [None] * rank.world_size
    torch.distributed.all_gather_object(reasons, reason)
    return next((text for text in reasons if text), None)


def _why_not_built() -> str | None:
    """Builds DeepSpeed's all-reduce (the first time) and loads it; why that cannot be, None where it is done.

    DeepSpeed would do the same where nothing catches the error, and finds it loaded.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from dsserve.kernels.compile_lock import compiling

    try:
        with compiling(_SHM_OP, others_compile=True), contextlib.redirect_stdout(io.StringIO()):
            ShareMemCommBuilder().load()
    except Exception as error:
        return f"DeepSpeed's CPU op cannot be built or loaded ({type(error).__name__}: {first_line(error)})"
    return None


def _why_no_shared_memory(rank: RankInfo) -> str | None:
    """Why DeepSpeed's shared-memory all-reduce cannot be used here; None where it can."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found on PATH, so DeepSpeed's CPU op cannot be compiled"
    if rank.local_world_size != rank.world_size:
        return "the ranks are on several hosts"
    cores = len(os.sched_getaffinity(0))
    if rank.local_world_size > cores:  # it waits by spinning, on the core that the rank it waits for needs
        return f"{rank.local_world_size} ranks share {cores} core(s)"
    filesystem = os.statvfs("/dev/shm")
    free, needed = filesystem.f_bavail * filesystem.f_frsize, rank.local_world_size * _SHM_SEGMENT_BYTES
    if free < needed:  # a full /dev/shm would kill the process with SIGBUS
        return f"/dev/shm has {free >> 20} MiB free and the all-reduce needs {needed >> 20} MiB"
    return None


def agree_on_least(value: int, rank: RankInfo) -> int:
    """The smallest of the ranks' values, on all of them."""
    if rank.world_size == 1:
        return value
    values = torch.tensor(value)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return int(values)


def _unlink_shared_memory(rank: RankInfo) -> None:
    """Removes this rank's segment by name: every rank has mapped it, and DeepSpeed would leave 66 MiB behind."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for path in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank.rank}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


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
