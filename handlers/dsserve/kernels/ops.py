"""The fused operations of a device: compiled C++ on a CPU (`cpu_ops`), Triton on a GPU (`gpu_ops`)."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.kernels import cpu_ops, gpu_ops


def load_ops(device: torch.device) -> Any | None:
    """Compiles (the first time) and loads the operations for a device; None where they cannot be had."""
    if device.type == "cpu":
        return torch.ops.dsserve_cpu if cpu_ops.load_cpu_ops() else None
    return gpu_ops if gpu_ops.load_gpu_ops() else None


def loaded_ops(device: torch.device) -> Any | None:
    """What `load_ops` gave in this process, None before it."""
    if device.type == "cpu":
        return torch.ops.dsserve_cpu if cpu_ops.is_loaded() else None
    return gpu_ops if gpu_ops.is_loaded() else None
