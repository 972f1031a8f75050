"""Compile what a CPU needs ahead of time, so that the first model need not wait for it: DeepSpeed's shared-memory
all-reduce and our own operations.

Takes about 40 seconds once; the result lies in torch's extension cache. Without a compiler the ranks use gloo and plain
torch operations instead, about 3 times slower a step, and this says so.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from pathlib import Path

import typer

from scripts.console import fail, say
from scripts.machine import AUTO, MachineError, resolve_device
from scripts.prepare_model import ROOT

GLOO = "the ranks' all-reduce will go over gloo, about 3 times slower"


def missing_tools() -> list[str]:
    """What torch needs to compile an extension and PATH does not have."""
    return [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]


def build() -> bool:
    """Compile and load them; False where ours cannot be had. Raises whatever torch's extension builder raises."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    sys.path.insert(0, str(ROOT / "handlers"))  # a PYTHON that was named does not have the package installed
    from dsserve.cpu_ops import load_cpu_ops

    return load_cpu_ops()


def main(device: str = typer.Option(AUTO, help="auto, cpu or gpu: a GPU needs no CPU op")) -> None:
    """Compile the CPU's operations, or say what is used instead."""
    try:
        if resolve_device(device) == "gpu":
            return
    except MachineError as error:
        fail(str(error))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    missing = missing_tools()
    if missing:
        names = " and ".join(missing)
        say(f"{names} not found: {GLOO}. To change that, install {names} and run `make ops`")
        return
    started_s = time.monotonic()
    try:
        complete = build()
    except (RuntimeError, OSError, ImportError) as error:
        fail(f"DeepSpeed's CPU all-reduce cannot be compiled: {str(error).strip().splitlines()[-1]}")
    say(f"DeepSpeed's CPU all-reduce is ready ({time.monotonic() - started_s:.0f} s)")
    if not complete:
        say("the handlers' own CPU operations cannot be compiled here: torch's are used, some 10 % slower")


if __name__ == "__main__":
    typer.run(main)
