"""What an endpoint makes of a request: the sequences to generate and the reply that their events fill."""

from __future__ import annotations

from dataclasses import dataclass

from dsserve.core.request import GenerationRequest
from dsserve.protocol.reply import Reply


@dataclass(frozen=True)
class Job:
    """One client's request on its way. An answer that needs no generation is plain bytes of JSON instead.

    Attributes:
        timeout_s: seconds from its arrival at the handler after which it is given up.
    """

    reply: Reply
    requests: tuple[GenerationRequest, ...]
    timeout_s: float
