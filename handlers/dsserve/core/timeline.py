"""When things happened to one sequence of rank 0's engine. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timeline:
    """When things happened to one sequence, in seconds of the monotonic clock; None = not yet, or never.

    Attributes:
        arrived: its request came to the handler.
        admitted: the step began that read its prompt, or the first part of it.
        first_token: the step ended that read it to the end.
        last_token: its last token was chosen, or its text could not be made; what follows is its text.
        ended: its last text was ready, or it was given up.
    """

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
