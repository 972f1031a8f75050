"""The next tokens of a step's rows between their launch and the moment when the host knows them. Rank 0's alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from dsserve.sampling.sampler import SamplingState, choose


class Choice(Protocol):
    """Tokens that are being chosen."""

    @property
    def tokens(self) -> torch.Tensor | None:
        """`[n]`, int64, on the device and in its order, never negative; None where the host chooses in `read`."""

    @property
    def revised(self) -> Sequence[int]:
        """After `read`: the rows whose tokens are others than in `tokens`; what was computed from those is void."""

    def read(self) -> list[int]:
        """The token of each row; waits for them, but not for what was launched behind them. Once. Where none could be
        chosen, a zero, and the row's state has a fault from now on."""

    def take_back(self, rows: Sequence[int]) -> None:
        """These rows were void: their streams give the numbers again that were taken for this choice."""


# (logits [n, V], the state of each row) -> their choice; the logits have to stay as they are until it is read
Launch = Callable[[torch.Tensor, "list[SamplingState]"], Choice]


class HostChoice:
    """What `sampler.choose` gives, when it is read."""

    tokens = None
    revised: Sequence[int] = ()

    def __init__(self, logits: torch.Tensor, states: list[SamplingState]) -> None:
        self._logits = logits
        self._states = states

    def read(self) -> list[int]:
        """See `Choice`."""
        return choose(self._logits, self._states)

    def take_back(self, rows: Sequence[int]) -> None:
        """See `Choice`: nothing is taken before `read`."""
