"""Compile DeepSpeed's shared-memory all-reduce for CPUs ahead of time, so that the first model need not wait for it.

Takes about half a minute once; the result lies in torch's extension cache. Without a compiler the ranks use gloo
instead, about 3 times slower a step, and this says so.
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

GLOO = "the ranks' all-reduce will go over gloo, about 3 times slower"


def missing_tools() -> list[str]:
    """What torch needs to compile an extension and PATH does not have."""
    return [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]


def build() -> None:
    """Compile and load the op. Raises whatever torch's extension builder raises."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def main(device: str = typer.Option(AUTO, help="auto, cpu or gpu: a GPU needs no CPU op")) -> None:
    """Compile DeepSpeed's CPU all-reduce, or say that gloo is used."""
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
        build()
    except (RuntimeError, OSError, ImportError) as error:
        fail(f"DeepSpeed's CPU all-reduce cannot be compiled: {str(error).strip().splitlines()[-1]}")
    say(f"DeepSpeed's CPU all-reduce is ready ({time.monotonic() - started_s:.0f} s)")


if __name__ == "__main__":
    typer.run(main)
