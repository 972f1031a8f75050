"""Division of logits by temperatures: from 1e-5 on without overflow, each row on its own."""

from __future__ import annotations

import torch

# Below this temperature the likeliest token is taken (as in vLLM): dividing by less leaves fp32's range.
GREEDY_BELOW = 1e-5
# Below this one the largest logit is taken off first, so that nothing overflows.
_TINY = 1e-3
# Above this one fp32's range ends, and a banned token's logit would be no number. All tokens are equally likely long
# before.
_HIGHEST = 1e30


def clipped(temperature: float) -> float:
    """The nearest one that rows can be divided by."""
    return float(min(max(temperature, GREEDY_BELOW), _HIGHEST))


def scale(logits: torch.Tensor, temperatures: list[float]) -> None:
    """Divides rows `[n, V]`, fp32, by their temperatures, in place."""
    divisors = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)[:, None]
    if min(temperatures) < _TINY:
        logits -= _shift(divisors, logits.amax(dim=-1, keepdim=True))
    logits /= divisors.float()


def scaled(
    logits: torch.Tensor, temperatures: torch.Tensor, largest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers as `scale`'s without a decision on the host.

    Args:
        logits: `[n, V]`, fp32.
        temperatures: `[n, 1]`, fp64.
        largest: logit of each row, `[n, 1]`.

    Returns:
        The rows over their temperatures, and the largest of each.
    """
    shift, divisors = _shift(temperatures, largest), temperatures.float()
    return (logits - shift).div_(divisors), (largest - shift).div_(divisors)


def _shift(temperatures: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return torch.where(temperatures < _TINY, largest, 0.0)
