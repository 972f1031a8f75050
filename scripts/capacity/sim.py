"""Replicas behind a balancer, event by event: who gets which request, when each call of a replica ends.

A replica works as the engine does: a call that admits prompts ends with their first tokens, any other call runs up to
`steps_per_call` steps; what arrives meanwhile waits. The balancer gives a replica at most `server_max` requests and
keeps the rest, as configs/haproxy does. Not covered: the network, the balancer's own time, KV memory that runs out.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.capacity.load import Job
from scripts.capacity.route import Router
from scripts.capacity.speed import Speed

KEPT_BEGINNINGS = 8  # of prompts, whose pages a server keeps; a guess: they are as many as there is memory for


@dataclass(slots=True)
class Request:
    """One request on its way. Times in seconds; None where the moment never came."""

    job: Job
    left: int
    first_s: float | None = None
    end_s: float | None = None
    cut: bool = False

    @property
    def first_ms(self) -> float | None:
        return None if self.first_s is None else (self.first_s - self.job.at_s) * 1e3

    @property
    def whole_ms(self) -> float | None:
        return None if self.end_s is None else (self.end_s - self.job.at_s) * 1e3

    @property
    def token_ms(self) -> float | None:
        """Mean time between tokens; None for one token, or a request that did not end."""
        if self.end_s is None or self.first_s is None or self.job.new_tokens < 2:
            return None
        return (self.end_s - self.first_s) * 1e3 / (self.job.new_tokens - 1)


@dataclass(slots=True)
class Replica:
    """One TP group: rows that generate, requests that wait for one, beginnings whose keys and values it holds."""

    number: int
    running: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    up: bool = True
    life: int = 0  # counts its deaths: a call's end of an earlier life is nobody's
    busy_ms: float = 0.0
    calling: bool = False

    @property
    def open(self) -> int:
        return len(self.running) + len(self.waiting)


@dataclass(frozen=True)
class Failure:
    """A replica dies at `at_s` and serves again after `down_s` seconds."""

    at_s: float
    replica: int
    down_s: float


ARRIVE, CALLED, DIE, RETURN = range(4)


class Simulation:
    """One run; use once."""

    def __init__(self, speed: Speed, replicas: int, router: Router, server_max: int) -> None:
        self.replicas = [Replica(number) for number in range(replicas)]
        self.queue: deque[Request] = deque()
        self._speed, self._router = speed, router
        self._server_max = min(server_max, speed.max_running + speed.max_waiting)
        self._events: list[tuple[float, int, int, object, int]] = []
        self._order = itertools.count()

    def run(self, jobs: Sequence[Job], failures: Sequence[Failure] = ()) -> list[Request]:
        """All requests as they ended, in order of arrival."""
        requests = [Request(job, job.new_tokens) for job in jobs]
        for request in requests:
            self._at(request.job.at_s, ARRIVE, request)
        for failure in failures:
            self._at(failure.at_s, DIE, self.replicas[failure.replica])
            self._at(failure.at_s + failure.down_s, RETURN, self.replicas[failure.replica])
        while self._events:
            now, _, kind, subject, life = heapq.heappop(self._events)
            if isinstance(subject, Request):
                self.queue.append(subject)
            elif isinstance(subject, Replica):
                self._change(now, kind, subject, life)
            self._dispatch(now)
        return requests

    def _at(self, time_s: float, kind: int, subject: object, life: int = 0) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), kind, subject, life))

    def _change(self, now: float, kind: int, replica: Replica, life: int) -> None:
        if kind == CALLED and life == replica.life:
            self._finish_call(now, replica)
        elif kind == DIE and replica.up:
            replica.up, replica.calling, replica.life = False, False, replica.life + 1
            # What has a first token is lost to its client; the rest goes back to the balancer, to its front.
            for request in replica.running:
                request.cut = request.first_s is not None
                request.left = request.job.new_tokens
            self.queue.extendleft([*reversed(replica.waiting), *(r for r in replica.running if not r.cut)])
            replica.running.clear()
            replica.waiting.clear()
            replica.kept.clear()
        elif kind == RETURN:
            replica.up = True

    def _dispatch(self, now: float) -> None:
        """Gives what waits at the balancer to replicas that may have more."""
        while self.queue:
            replica = self._router.choose(self.replicas, self.queue[0].job, self._server_max)
            if replica is None:
                return
            replica.waiting.append(self.queue.popleft())
            if not replica.calling:
                self._start_call(now, replica)

    def _start_call(self, now: float, replica: Replica) -> None:
        speed, tokens, new = self._speed, 0, list[Request]()
        while replica.waiting and len(replica.running) + len(new) < speed.max_running:
            new.append(replica.waiting.popleft())
            tokens += self._to_prefill(replica, new[-1].job)
        steps = 1 if new else min(speed.steps_per_call, max(request.left for request in replica.running))
        took_ms = steps * speed.decode_ms(len(replica.running)) + (speed.admit_ms(tokens) if new else 0.0)
        for request in replica.running:
            request.left -= steps
        for request in new:
            request.left -= 1
        replica.running += new
        replica.busy_ms += took_ms
        replica.calling = True
        self._at(now + took_ms / 1e3, CALLED, replica, replica.life)

    def _to_prefill(self, replica: Replica, job: Job) -> int:
        """Tokens of the prompt that must be computed; its beginning is kept from now on."""
        if not job.shared_tokens:
            return job.prompt_tokens
        known = job.beginning in replica.kept
        replica.kept[job.beginning] = None
        replica.kept.move_to_end(job.beginning)
        if len(replica.kept) > KEPT_BEGINNINGS:
            replica.kept.popitem(last=False)
        return job.prompt_tokens - job.shared_tokens * known

    def _finish_call(self, now: float, replica: Replica) -> None:
        for request in replica.running:
            if request.first_s is None:
                request.first_s = now
            if request.left <= 0:
                request.end_s = now
        replica.running = [request for request in replica.running if request.left > 0]
        replica.calling = False
        if replica.open:
            self._start_call(now, replica)


def failures(replicas: int, seconds: float, mean_hours: float, down_s: float, seed: int) -> list[Failure]:
    """Replicas that die independently, each once in `mean_hours` on average."""
    dice, found = random.Random(seed), list[Failure]()
    for replica in range(replicas):
        now = dice.expovariate(1 / (mean_hours * 3600))
        while now < seconds:
            found.append(Failure(now, replica, down_s))
            now += down_s + dice.expovariate(1 / (mean_hours * 3600))
    return found
