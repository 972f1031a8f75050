"""Rank 0's engine under a time limit: what a stalled or broken rank leaves of it is an answer to every request.

The engine's steps run in one thread of their own, which may hang in a collective for ever; the thread that called
waits for it so long and no longer. Does not end the process (`watchdog`) and knows no HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dsserve.core.errors import RETRY_AFTER_S, RequestError
from dsserve.core.request import GenerationRequest, Origin, TokenEvent
from dsserve.engine.engine import Engine
from dsserve.sampling.faults import describe

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class EngineThread:
    """The one thread that touches rank 0's engine. Handing a call over costs about 6 microseconds."""

    def __init__(self, device: torch.device) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._device = device
        # A daemon: the interpreter must not wait for it at its end.
        threading.Thread(target=self._work, name="dsserve-engine", daemon=True).start()

    def call(self, function: Callable[[], Result], timeout_s: float | None = None) -> Result:
        """Runs `function` in the thread. One caller at a time, and none after a TimeoutError.

        Raises:
            TimeoutError: it did not end in time, and goes on.
            BaseException: what the function raised.
        """
        result, error = self.outcome(function, timeout_s)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def outcome(
        self, function: Callable[[], Result], timeout_s: float | None = None
    ) -> tuple[Result | None, BaseException | None]:
        """As `call`, but what the function raised is returned beside its result: a BaseException of the thread's, such
        as a Rust panic, is none of the caller's."""
        self._calls.put(function)
        try:
            return self._results.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while True:
            function = self._calls.get()
            try:
                self._results.put((function(), None))
            except BaseException as error:  # else the thread would end, and its caller wait for the time limit
                self._results.put((None, error))


class LeaderEngine:
    """Rank 0's `Engine` behind its thread. After a failure every live request is answered, once, with an error.

    Args:
        timeout_s: longest time of one `run`.
        on_failure: called once, when the engine overran or raised; the ranks do not agree any more, so the worker
            has to end soon.
    """

    def __init__(self, engine: Engine, thread: EngineThread, timeout_s: float, on_failure: Callable[[], None]) -> None:
        self._engine = engine
        self._thread = thread
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._live: Counter[str] = Counter()  # request -> its sequences that have not ended
        self.has_failed = False

    @property
    def running(self) -> int:
        """See `Engine.running`."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """See `Engine.waiting`."""
        return self._engine.waiting

    def admit(self, request: GenerationRequest, origin: Origin | None = None) -> None:
        """See `Engine.admit`."""
        self._live[request.request_id] += 1
        self._engine.admit(request, origin)

    def evict(self, request_id: str) -> None:
        """See `Engine.evict`."""
        del self._live[request_id]
        self._engine.evict(request_id)

    def run(self, max_steps: int, limit_s: float = math.inf) -> list[TokenEvent]:
        """See `Engine.run`; never raises, and never takes longer than `timeout_s`."""
        try:
            events, error = self._thread.outcome(lambda: self._engine.run(max_steps, limit_s), self._timeout_s)
        except TimeoutError:
            return self._fail(f"a rank stalled: no end of a call after {self._timeout_s:.1f} s")
        if error is not None:
            return self._fail(describe(error))
        events = events or []
        self._live -= Counter(event.request_id for event in events if event.is_last)
        return events

    def _fail(self, why: str) -> list[TokenEvent]:
        logger.critical("[dsserve] %s; %d request(s) get an error, then the worker ends", why, len(self._live))
        self.has_failed = True
        self._on_failure()
        error = RequestError(
            "the server failed and is being restarted: send the request again",
            status=503, kind="server_error", retry_after_s=RETRY_AFTER_S,
        )  # fmt: skip
        return [TokenEvent(request_id, "", failed=True, error=error) for request_id in sorted(self._live)]
