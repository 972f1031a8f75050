"""DeepSpeed's `transformer_inference` op: loaded once a process, compiled first where no build of it lies in torch's
extension cache.

Compiling takes about a minute on 16 cores and needs nvcc; `make ops` does it ahead. Knows no model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import time
from collections.abc import Callable

from dsserve.core.errors import LoadError

logger = logging.getLogger(__name__)

# What an import finds wrong, what a compiler does, what DeepSpeed does not find (CUDA's version, an old GPU).
_FAULTS = (ImportError, RuntimeError, OSError, AssertionError)


def load_op(say: Callable[[str], None] = logger.info, verbose: bool = False) -> float:
    """Loads the op for every layer to come, and returns the seconds that took.

    Ranks that call it at the same time wait for the one that compiles.

    Args:
        verbose: show the compiler's output. Never in a worker, whose stdout TorchServe parses.

    Raises:
        LoadError: it cannot be compiled or loaded here, with the reason and the mend.
    """
    from deepspeed.ops.op_builder import InferenceBuilder
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    if BaseOp.inference_module is not None:
        return 0.0
    missing = missing_tools()
    if missing:
        raise LoadError(
            f"replace_with_kernel_inject: {' and '.join(missing)} not found, which DeepSpeed needs for its kernels; "
            "install CUDA's compiler and ninja and run `make ops`, or set replace_with_kernel_inject: false (AutoTP)"
        )
    from dsserve.kernels.compile_lock import compiling

    started_s = time.monotonic()
    try:
        silence = contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO())
        with compiling(InferenceBuilder.NAME, others_compile=True), silence:
            BaseOp.inference_module = InferenceBuilder().load(verbose=verbose)
    except _FAULTS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise LoadError(
            f"replace_with_kernel_inject: DeepSpeed's kernels cannot be compiled or loaded here ({reason}); run "
            "`make ops` to see the compiler's output, or set replace_with_kernel_inject: false (AutoTP)"
        ) from error
    seconds = time.monotonic() - started_s
    say(f"[dsserve] DeepSpeed's kernels (transformer_inference) compiled or found, and loaded, in {seconds:.1f} s")
    return seconds


def missing_tools() -> list[str]:
    """What the op's build needs and this machine lacks. DeepSpeed asks nvcc for its version even when all is built."""
    from torch.utils.cpp_extension import CUDA_HOME

    has_nvcc = shutil.which("nvcc") or (CUDA_HOME and os.access(os.path.join(CUDA_HOME, "bin", "nvcc"), os.X_OK))
    return [name for name, found in (("nvcc", has_nvcc), ("ninja", shutil.which("ninja"))) if not found]
