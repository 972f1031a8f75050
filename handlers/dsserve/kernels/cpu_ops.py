"""CPU only: the small operations between a decode step's matmuls as three compiled ones (csrc/cpu_ops.cpp).

Compiled once by torch's extension builder (about 10 s; needs g++ and ninja); called as `torch.ops.dsserve_cpu`. Does
not decide what they replace (`fused_ops`).
"""

from __future__ import annotations

import logging
import shutil
from functools import cache
from pathlib import Path

import torch

from dsserve.core.errors import first_line

logger = logging.getLogger(__name__)

_NAME = "dsserve_cpu_ops"
_SOURCE = Path(__file__).parent / "csrc" / "cpu_ops.cpp"
# Without contraction (fused multiply-add) products round as torch's do.
_FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off"]


@cache
def load_cpu_ops() -> bool:
    """Compiles (the first time) and loads the operations; False, with the reason in the log, where that cannot be."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        logger.warning("[dsserve] no compiled CPU operations: %s not found on PATH", " and ".join(missing))
        return False
    from torch.utils.cpp_extension import load_inline

    from dsserve.kernels.compile_lock import compiling

    try:
        # The text, not the file: its path differs at every start, and a new path is compiled anew.
        with compiling(_NAME):
            load_inline(
                _NAME, [_SOURCE.read_text(encoding="utf-8")], extra_cflags=_FLAGS, is_python_module=False,
                no_implicit_headers=True, with_pytorch_error_handling=False,
            )  # fmt: skip
    except (RuntimeError, OSError, ImportError) as error:
        logger.warning("[dsserve] no compiled CPU operations: %s", first_line(error))
        return False
    return True


def is_loaded() -> bool:
    """Whether the operations can be called in this process."""
    return hasattr(torch.ops.dsserve_cpu, "store")
