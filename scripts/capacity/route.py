"""Who gets the next request: three ways of a balancer, as HAProxy's `roundrobin`, `leastconn` and `hash` go.

A replica that is down, or has as many requests as the balancer gives one, is passed over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from scripts.capacity.load import Job

ROUND_ROBIN, LEAST, PREFIX = "round robin", "least", "prefix"
POLICIES = (ROUND_ROBIN, LEAST, PREFIX)
BALANCE_FACTOR = 1.5  # HAProxy's hash-balance-factor 150


class Target(Protocol):
    """What a router sees of a replica."""

    number: int
    up: bool

    @property
    def open(self) -> int: ...


T = TypeVar("T", bound=Target)


class Router:
    """One of POLICIES; keeps where it is."""

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is unknown: use {', '.join(POLICIES)}")
        self._policy = policy
        self._next = 0
        self._rings: dict[int, list[int]] = {}

    def choose(self, replicas: Sequence[T], job: Job, most: int) -> T | None:
        """The replica for this request; None if all that are up have `most` requests."""
        free = [replica for replica in replicas if replica.up and replica.open < most]
        if not free:
            return None
        if self._policy == PREFIX:
            found = self._on_the_ring(replicas, free, job.beginning)
        else:
            size = len(replicas)
            if self._policy == LEAST:
                fewest = min(replica.open for replica in free)
                free = [replica for replica in free if replica.open == fewest]
            found = min(free, key=lambda replica: (replica.number - self._next) % size)
        self._next = found.number + 1
        return found

    def _on_the_ring(self, replicas: Sequence[T], free: Sequence[T], beginning: int) -> T:
        """The first one of the beginning's own order that has no more than 1.5 times its share."""
        share = (sum(replica.open for replica in free) + 1) / len(free)
        light = {replica.number for replica in free if replica.open < math.ceil(BALANCE_FACTOR * share)}
        ring = self._rings.setdefault(beginning, sorted(range(len(replicas)), key=lambda n: _place(beginning, n)))
        return replicas[next(number for number in ring if number in light)]


def _place(beginning: int, replica: int) -> bytes:
    return hashlib.blake2b(f"{beginning}/{replica}".encode(), digest_size=8).digest()
