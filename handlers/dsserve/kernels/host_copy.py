"""Numbers on their way to a device and back, neither of which waits for what else is queued there.

On a GPU both ways lead through pinned memory. Every transfer has its own: torch gives pinned memory to the next one
only when the copies that it was used for have run, so nothing is overwritten on its way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def stage(numbers: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(Lists of) numbers as a tensor on the host, from where `copy_(..., non_blocking=True)` to the device waits for
    nothing."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")


def move(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device; waits for nothing."""
    found = torch.from_numpy(np.ascontiguousarray(numbers))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


class Readback:
    """The values `[n]` of a device tensor as they are at this point of the current stream."""

    def __init__(self, values: torch.Tensor) -> None:
        on_gpu = values.device.type == "cuda"
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[Any]:
        """Waits until they are there; not for what was queued behind them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
