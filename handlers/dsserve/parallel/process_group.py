"""The process group, which DeepSpeed shares: started once, with the all-reduce that the machine allows.

Removes the shared-memory segments that DeepSpeed leaves. Sums nothing (`collectives`) and shards nothing
(`loading.ds_engine`).
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import shutil
from datetime import timedelta

import torch

from dsserve.core.errors import first_line
from dsserve.parallel.rank import RankInfo

logger = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 600
# What DeepSpeed 0.19.8 maps for each rank: 2 small and 2 large buffers (csrc/cpu/comm/shm.cpp).
_SHM_SEGMENT_BYTES = 66 * 2**20
_SHM_OP = "deepspeed_shm_comm"


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


def _unlink_shared_memory(rank: RankInfo) -> None:
    """Removes this rank's segment by name: every rank has mapped it, and DeepSpeed would leave 66 MiB behind."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for path in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank.rank}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
