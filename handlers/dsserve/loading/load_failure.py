"""An exception that ends a load as one `LoadError`: what failed, in which stage, its type and place, and the mend.

Covers what no check has foreseen. Checks raise `LoadError` themselves, and those pass as they are.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from dsserve.core.errors import LoadError, first_line

_OURS = Path(__file__).resolve().parent
_MOST_CHARACTERS = 300
# gloo's words, and NCCL's, where the other side of a connection is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
# Stages in which the model's architecture plays no part.
BEFORE_THE_MODEL = ("settings", "start")
_NO_MEMORY = "can't allocate memory"  # of torch's allocator on a CPU, a plain RuntimeError


def explain(error: BaseException, what: str, stage: str, ranks: int = 1) -> LoadError:
    """The one line for `error`.

    Args:
        what: the architecture, or the model's path as long as the architecture is unknown.
        stage: the phase of the load.
        ranks: how many load the model together.
    """
    if isinstance(error, LoadError):
        return error
    message = first_line(error)[:_MOST_CHARACTERS]
    if is_memory_error(error):
        return LoadError(
            f"{what}: no memory is left in the stage '{stage}' ({message}): use more ranks (torchrun.nproc-per-node), "
            "deepspeed.quantization or a smaller model"
        )
    if lost_peer(error):
        return LoadError(
            f"{what}: another rank ended in the stage '{stage}' without a reason of its own: it was killed, often for "
            "want of memory; see the lines of its rank, and the kernel's log"
        )
    return LoadError(
        f"{what} cannot be served: {type(error).__name__} in the stage '{stage}' at {_place(error)} ({message}): "
        f"{_mend(error, stage, ranks)}"
    )


def is_memory_error(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _NO_MEMORY in str(error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the error says nothing of the model: no memory, another rank that has gone, a device that failed."""
    return is_memory_error(error) or lost_peer(error) or isinstance(error, torch.AcceleratorError)


def lost_peer(error: BaseException) -> bool:
    """Whether the error says only that another rank has gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER)


def _place(error: BaseException) -> str:
    """`file:line` of the innermost call, and of the innermost one of ours where that is another."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    ours = [frame for frame in frames if _OURS in Path(frame.filename).resolve().parents]
    last = frames[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    if not ours or ours[-1] is last:
        return place
    return f"{place}, called from {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _mend(error: BaseException, stage: str, ranks: int) -> str:
    if "PackedLinear" in str(error) or "FusedPart" in str(error):
        return "the model reads a weight that was packed; set handler.pack_weights: false"
    if isinstance(error, torch.AcceleratorError):
        return "the device failed: see nvidia-smi and the kernel's log, then load again"
    if isinstance(error, OSError):
        return "mend what the message names (a file, a folder or a port), then load again"
    if stage in BEFORE_THE_MODEL:
        return "no check has foreseen this; report this line"
    few = f" with {ranks} ranks; one rank (torchrun.nproc-per-node: 1) may do" if ranks > 1 else " here"
    return f"this architecture is not served{few}; where others like it are, report this line"
