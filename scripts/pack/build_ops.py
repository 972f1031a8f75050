"""Compile ahead of time what a model would wait for at its load: on a CPU DeepSpeed's shared-memory all-reduce and our
own operations, on a GPU DeepSpeed's kernels for `replace_with_kernel_inject`.

Takes about 40 seconds once on a CPU, a minute on a GPU host; the results lie in torch's extension cache. Without a
compiler a CPU's ranks use gloo and plain torch operations instead, about 3 times slower a step, and this says so.
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

from scripts.common.console import fail, say
from scripts.common.machine import AUTO, MachineError, resolve_device
from scripts.common.paths import ROOT

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
    from dsserve.kernels.cpu_ops import load_cpu_ops

    return load_cpu_ops()


def main(
    device: str = typer.Option(AUTO, help="auto, cpu or gpu: a GPU needs no CPU op"),
    kernels: bool = typer.Option(False, help="on a GPU: compile the kernels of replace_with_kernel_inject"),
) -> None:
    """Compile what the device needs, or say what is used instead."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        if resolve_device(device) == "gpu":
            if kernels:
                _build_kernels()
            return
    except MachineError as error:
        fail(str(error))
    _build_cpu_ops()


def _build_kernels() -> None:
    """DeepSpeed's `transformer_inference` op alone, with the compiler's output."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    sys.path.insert(0, str(ROOT / "handlers"))  # a PYTHON that was named does not have the package installed
    from dsserve.core.errors import LoadError
    from dsserve.injection.op import load_op

    try:
        say(f"DeepSpeed's kernels are ready ({load_op(lambda _: None, verbose=True):.0f} s)")
    except LoadError as error:
        fail(str(error))


def _build_cpu_ops() -> None:
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
