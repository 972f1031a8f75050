"""How long the next call of the handler may take: rank 0's rule, on times and counts alone.

Every call costs the same few milliseconds however many steps it holds. But tokens leave at its end, a client that left
or ran out of time is noticed there, and a request that arrives meanwhile waits for it. The engine ends a call sooner
where something can be answered (`Engine.run`); this only says how long it may go on otherwise.
"""

from __future__ import annotations

# Where nobody streams, nothing leaves before a text ends. What is left to notice may wait so long.
_UNSEEN_S = 0.5
# A call takes at most this share of the time between arrivals while a newcomer would find a free slot: few of them
# arrive within it, and those wait for a part of it.
_SHARE_OF_GAP = 0.5
# Weight of the latest time between arrivals in their moving average.
_NEWEST = 0.3


class CallLength:
    """Seconds of a call, from who listens and how often requests arrive.

    Args:
        stream_delay_s: how long a token of a stream may wait for those that leave with it.
    """

    def __init__(self, stream_delay_s: float) -> None:
        self._stream_delay_s = stream_delay_s
        self._gap_s: float | None = None
        self._arrived: float | None = None

    def arrived(self, now: float) -> None:
        """Requests came with the call that begins: one or many, since those of a burst do not foretell another."""
        if self._arrived is not None:
            gap = now - self._arrived
            self._gap_s = gap if self._gap_s is None else _NEWEST * gap + (1 - _NEWEST) * self._gap_s
        self._arrived = now

    def limit_s(self, now: float, streaming: bool, has_room: bool) -> float:
        """The longest time of the call that begins.

        Args:
            streaming: some client reads its tokens as they come.
            has_room: a request that arrived would find a free slot.
        """
        limit = self._stream_delay_s if streaming else max(self._stream_delay_s, _UNSEEN_S)
        if not has_room or self._gap_s is None or self._arrived is None:
            return limit
        return min(limit, _SHARE_OF_GAP * max(self._gap_s, now - self._arrived))
