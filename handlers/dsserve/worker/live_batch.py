"""TorchServe's continuous batching, rank 0's side: rows in, one item a row out, on every call of the handler.

Keeps which requests are live; starts, continues and ends them in the engine. TorchServe calls with all live requests; a
payload comes once; a client that went away is simply missing. Does not parse bodies (`routes`) and does not generate
(`engine`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.core.request import Origin, TokenEvent
from dsserve.engine.guarded_engine import LeaderEngine
from dsserve.protocol import refusals
from dsserve.protocol.bounds import CALL_BYTES, FRAME_BYTES, SHARE_BYTES
from dsserve.protocol.job import Job
from dsserve.protocol.reply import JSON_TYPE, JsonReply, Reply, error_body
from dsserve.protocol.routes import answer
from dsserve.protocol.rows import row_content_type, row_origin, row_path
from dsserve.protocol.served import ServedModel
from dsserve.sampling.faults import Fault
from dsserve.worker.call_length import CallLength

logger = logging.getLogger(__name__)

# New requests of one call are read for so long; those behind them are sent away, so that streams go on.
READING_S = 5.0
CLIENT_ID_HEADER = "x-client-request-id"  # the client's own id goes back under this name


@dataclass
class _Row:
    """One live request: its name in logs, how it is answered, when it is given up, what is to go out.

    At the end of a call at most `FRAME_BYTES` of `frame` leave: TorchServe drops a worker that sends more at once than
    its `max_response_size`, and all streams with it. The row lives until the last piece has left.
    """

    name: str
    reply: Reply
    timeout_s: float
    deadline: float  # of the monotonic clock
    is_new: bool = True
    done: bool = False
    frame: bytearray = field(default_factory=bytearray)


class LiveBatch:
    """All live requests of the worker.

    Args:
        engine: rank 0's engine.
        served: the model and its limits.
        max_steps: most steps of one call.
        call_length: how long a call may take.
        is_draining: whether new requests are to be refused; asked once a call.
        count_error: hears of each request that is answered with an error, once.
    """

    def __init__(
        self,
        engine: LeaderEngine,
        served: ServedModel,
        max_steps: int,
        call_length: CallLength,
        is_draining: Callable[[], bool] = lambda: False,
        count_error: Callable[[RequestError], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._served = served
        self._max_steps = max_steps
        self._call_length = call_length
        self._is_draining = is_draining
        self._count_error = count_error
        self._rows: dict[str, _Row] = {}

    @property
    def live(self) -> int:
        """Requests that were not answered to their end yet."""
        return len(self._rows)

    def serve(self, data: list[dict[str, Any]], ctx: Any) -> list[bytes]:
        """One call of the handler: answers what is wrong, admits what is new, runs the engine, collects the frames."""
        ids = [ctx.request_ids[index] for index in range(len(data))]
        self._drop_gone(set(ids))
        answered: dict[str, bytes | RequestError] = {}
        draining = self._is_draining()
        reading_until = time.monotonic() + READING_S
        for index, request_id in enumerate(ids):
            if request_id not in self._rows:
                origin = row_origin(ctx, index, request_id, time.monotonic())
                if origin.client_id is not None:
                    ctx.set_response_header(index, CLIENT_ID_HEADER, origin.client_id)
                if draining:
                    found: bytes | RequestError | None = refusals.draining()
                elif origin.arrived > reading_until:
                    found = refusals.busy(READING_S)
                else:
                    found = self._start(index, request_id, data[index], origin, ctx)
                if isinstance(found, RequestError):
                    self._refuse(origin.name(request_id), found)
                if found is not None:
                    answered[request_id] = found
        for event in self._engine.run(self._max_steps, self._limit_s()):
            self._take(event, answered)
        self._end_overdue(answered)
        return self._collect(ids, answered, ctx)

    def _limit_s(self) -> float:
        now = time.monotonic()
        if any(row.is_new for row in self._rows.values()):
            self._call_length.arrived(now)
        if any(row.frame for row in self._rows.values()):
            return 0.0  # one step: what is left of a reply leaves with the next call, and must not grow meanwhile
        streaming = any(row.reply.is_stream and not row.done for row in self._rows.values())
        has_room = self._engine.running + self._engine.waiting < self._served.limits.max_running
        return self._call_length.limit_s(now, streaming, has_room)

    def _drop_gone(self, ids: set[str]) -> None:
        for request_id in [known for known in self._rows if known not in ids]:
            row = self._rows.pop(request_id)
            self._engine.evict(request_id)
            logger.info("[dsserve] %s: client gone, slot freed", row.name)

    def _start(
        self, index: int, request_id: str, row: dict[str, Any], origin: Origin, ctx: Any
    ) -> bytes | RequestError | None:
        """Starts a request; what can be answered at once is returned."""
        name = origin.name(request_id)
        try:
            found = answer(row_path(ctx, index), request_id, row, row_content_type(ctx, index, row), self._served)
            if isinstance(found, bytes):
                return self._begin(request_id, found, origin)
            self._check_room(len(found.requests))
            self._admit(request_id, found, origin)
        except RequestError as error:
            return error
        except BaseException as error:  # one that left `handle` would cut every stream of the worker
            fault = Fault.of(error)
            logger.error("[dsserve] %s: %s while reading the request", name, fault.cause)
            self._engine.evict(request_id)
            self._rows.pop(request_id, None)
            return fault.error or refusals.unreadable()
        return None

    def _begin(self, request_id: str, found: bytes, origin: Origin) -> bytes | None:
        """A finished answer, at once where it is short, else piece by piece."""
        if len(found) <= FRAME_BYTES.most:
            return found
        timeout_s = self._served.limits.timeout_s
        row = _Row(origin.name(request_id), JsonReply(), timeout_s, origin.arrived + timeout_s, done=True)
        row.frame += found
        self._rows[request_id] = row
        return None

    def _refuse(self, name: str, error: RequestError) -> None:
        logger.info("[dsserve] %s: refused with %d (%s)", name, error.status, error.code or error.kind)
        self._count_error(error)

    def _check_room(self, sequences: int) -> None:
        places = self._served.limits.max_running + self._served.limits.max_waiting
        running, waiting = self._engine.running, self._engine.waiting
        if running + waiting + sequences > places:
            raise refusals.full(sequences, running, waiting, places)

    def _admit(self, request_id: str, job: Job, origin: Origin) -> None:
        for request in job.requests:
            self._engine.admit(request, origin)
        name = origin.name(request_id)
        self._rows[request_id] = _Row(name, job.reply, job.timeout_s, origin.arrived + job.timeout_s)
        longest = max(len(request.prompt_ids) for request in job.requests)
        logger.info(
            "[dsserve] %s: %d text(s), at most %d prompt tokens and %d new",
            name, len(job.requests), longest, max(request.max_new_tokens for request in job.requests),
        )  # fmt: skip

    def _take(self, event: TokenEvent, answered: dict[str, bytes | RequestError]) -> None:
        row = self._rows.get(event.request_id)
        if row is None or row.done:
            return
        if event.failed:
            self._give_up(event.request_id, event.error or refusals.failed(), answered)
            return
        try:
            row.frame += row.reply.take(event)
        except BaseException as error:  # of a text that nobody foresaw: its neighbours are not concerned
            logger.error("[dsserve] %s: %s while rendering the reply", row.name, Fault.of(error).cause)
            self._give_up(event.request_id, refusals.failed(), answered)
            return
        if row.reply.is_done:
            row.done = True
            logger.info(
                "[dsserve] %s: %d new tokens, %s",
                row.name, row.reply.usage.completion_tokens, event.finish_reason,
            )  # fmt: skip

    def _end_overdue(self, answered: dict[str, bytes | RequestError]) -> None:
        now = time.monotonic()
        overdue = [request_id for request_id, row in self._rows.items() if now >= row.deadline and not row.done]
        for request_id in overdue:
            row = self._rows[request_id]
            logger.info("[dsserve] %s: given up after its timeout of %g s", row.name, row.timeout_s)
            self._give_up(request_id, refusals.overdue(row.timeout_s), answered)

    def _give_up(self, request_id: str, error: RequestError, answered: dict[str, bytes | RequestError]) -> None:
        """Ends a request with an error: as its status, or as its last event where the status has gone out."""
        row = self._rows[request_id]
        self._count_error(error)
        self._engine.evict(request_id)  # its texts have no reply to go to
        if row.is_new:
            answered[request_id] = error
            del self._rows[request_id]
            return
        row.frame += _rendered(row.name, row.reply.fail, error)
        row.done = True

    def _collect(self, ids: list[str], answered: dict[str, bytes | RequestError], ctx: Any) -> list[bytes]:
        left = CALL_BYTES.most
        items: list[bytes] = []
        criteria: list[Callable[[Any], bool | None]] = []
        for index, request_id in enumerate(ids):
            if request_id in answered:
                items.append(_answer_at_once(index, request_id, answered[request_id], ctx))
                criteria.append(_plain)
                continue
            row = self._rows[request_id]
            size = max(SHARE_BYTES, min(FRAME_BYTES.most, left))
            items.append(bytes(row.frame[:size]))
            del row.frame[:size]
            left -= len(items[-1])
            ends = row.done and not row.frame
            # A stream whose first frame is its last would hang the client: one-call answers go out as plain replies.
            criteria.append(_more if not ends else _plain if row.is_new else _last)
            if row.is_new:
                ctx.set_response_header(index, "content-type", row.reply.content_type)
            row.is_new = False
            if ends:
                del self._rows[request_id]
        ctx.stopping_criteria = criteria
        return items


def _answer_at_once(index: int, request_id: str, found: bytes | RequestError, ctx: Any) -> bytes:
    ctx.set_response_header(index, "content-type", JSON_TYPE)
    if isinstance(found, bytes):
        return found
    ctx.set_response_status(found.status, HTTPStatus(found.status).phrase, index)
    if found.retry_after_s is not None:
        ctx.set_response_header(index, "Retry-After", str(found.retry_after_s))
    return _rendered(request_id, error_body, found)


def _rendered(name: str, render: Callable[[RequestError], bytes], error: RequestError) -> bytes:
    """An error's bytes; a plainer one's where its message cannot be written."""
    try:
        return render(error)
    except BaseException as unforeseen:
        logger.error("[dsserve] %s: %s while rendering an error", name, Fault.of(unforeseen).cause)
        return render(refusals.failed())


def _more(_: Any) -> bool:
    return False


def _last(_: Any) -> bool:
    return True


def _plain(_: Any) -> None:
    return None
