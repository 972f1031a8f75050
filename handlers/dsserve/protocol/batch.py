"""TorchServe's continuous batching, rank 0's side: rows in, one item a row out, on every call of the handler.

Keeps which requests are live and how each wants its reply; starts, continues and ends them in the engine. TorchServe
calls with all live requests; a payload comes once; a client that went away is simply missing. Does not parse bodies
(`rows`, `prompt`) and does not generate (`generation`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from dsserve.errors import RequestError
from dsserve.generation.leader import RETRY_AFTER_S, LeaderEngine
from dsserve.generation.request import Limits
from dsserve.generation.scheduler import TokenEvent
from dsserve.protocol.prompt import build_request
from dsserve.protocol.reply import Reply, error_body, make_reply
from dsserve.protocol.rows import read_body, row_content_type
from dsserve.protocol.schema import parse_body

logger = logging.getLogger(__name__)

_INTERNAL = "internal_error"


@dataclass
class _Row:
    """One live request: how it is answered, and what goes out at the end of this call."""

    reply: Reply
    is_new: bool = True
    done: bool = False
    frame: bytearray = field(default_factory=bytearray)


class LiveBatch:
    """All live requests of the worker.

    Args:
        engine: rank 0's engine.
        max_steps: most decode steps in one call.
        is_draining: whether new requests are to be refused; asked once a call.
    """

    def __init__(
        self,
        engine: LeaderEngine,
        tokenizer: Any,
        limits: Limits,
        max_steps: int,
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_steps = max_steps
        self._is_draining = is_draining
        self._rows: dict[str, _Row] = {}

    @property
    def live(self) -> int:
        """Requests that were not answered to their end yet."""
        return len(self._rows)

    def serve(self, data: list[dict[str, Any]], ctx: Any) -> list[bytes]:
        """One call of the handler: answers what is wrong, admits what is new, runs the engine, collects the frames."""
        ids = [ctx.request_ids[index] for index in range(len(data))]
        self._drop_gone(set(ids))
        refused: dict[str, RequestError] = {}
        draining = self._is_draining()
        for index, request_id in enumerate(ids):
            if request_id not in self._rows:
                try:
                    if draining:
                        raise drain_error(request_id)
                    self._start(index, request_id, data[index], ctx)
                except RequestError as error:
                    refused[request_id] = error
        for event in self._engine.run(self._max_steps):
            self._take(event, refused)
        return self._collect(ids, refused, ctx)

    def _drop_gone(self, ids: set[str]) -> None:
        for request_id in [known for known in self._rows if known not in ids]:
            del self._rows[request_id]
            self._engine.evict(request_id)
            logger.info("[dsserve] %s: client gone, slot freed", request_id)

    def _start(self, index: int, request_id: str, row: dict[str, Any], ctx: Any) -> None:
        try:
            body = parse_body(read_body(row, row_content_type(ctx, index, row)))
            request = build_request(request_id, body, self._tokenizer, self._limits)
        except RequestError as error:
            logger.info("[dsserve] %s: refused with %d (%s)", request_id, error.status, error.kind)
            raise
        except Exception as error:  # an exception that left `handle` would cut every stream of the worker
            # Its message may hold the user's text, so only its type is logged.
            logger.error("[dsserve] %s: %s while reading the request", request_id, type(error).__name__)
            raise RequestError("the request could not be read", status=500, kind=_INTERNAL) from None
        self._rows[request_id] = _Row(make_reply(body))
        self._engine.admit(request)
        logger.info(
            "[dsserve] %s: %d prompt tokens, at most %d new",
            request_id,
            len(request.prompt_ids),
            request.max_new_tokens,
        )

    def _take(self, event: TokenEvent, refused: dict[str, RequestError]) -> None:
        row = self._rows.get(event.request_id)
        if row is None:
            return
        if event.failed:
            error = event.error or RequestError("the server failed on this request", status=500, kind=_INTERNAL)
            if row.is_new:  # its status has not gone out yet
                refused[event.request_id] = error
                del self._rows[event.request_id]
                return
            row.frame += row.reply.fail(error)
            row.done = True
            return
        if event.finish_reason is None or event.usage is None:
            row.frame += row.reply.delta(event.text)
            return
        row.frame += row.reply.finish(event.text, event.finish_reason, event.usage)
        row.done = True
        logger.info(
            "[dsserve] %s: %d new tokens, %s", event.request_id, event.usage.completion_tokens, event.finish_reason
        )

    def _collect(self, ids: list[str], refused: dict[str, RequestError], ctx: Any) -> list[bytes]:
        items: list[bytes] = []
        criteria: list[Callable[[Any], bool | None]] = []
        for index, request_id in enumerate(ids):
            if request_id in refused:
                error = refused[request_id]
                ctx.set_response_status(error.status, HTTPStatus(error.status).phrase, index)
                ctx.set_response_header(index, "content-type", "application/json")
                if error.retry_after_s is not None:
                    ctx.set_response_header(index, "Retry-After", str(error.retry_after_s))
                items.append(error_body(error))
                criteria.append(_plain)
                continue
            row = self._rows[request_id]
            items.append(bytes(row.frame))
            row.frame.clear()
            # A stream whose first frame is its last would hang the client: one-call answers go out as plain replies.
            criteria.append(_more if not row.done else _plain if row.is_new else _last)
            if row.is_new:
                ctx.set_response_header(index, "content-type", row.reply.content_type)
            row.is_new = False
            if row.done:
                del self._rows[request_id]
        ctx.stopping_criteria = criteria
        return items


def drain_error(request_id: str) -> RequestError:
    """What a request gets that arrives while the server ends."""
    logger.info("[dsserve] %s: refused with 503 (draining)", request_id)
    return RequestError(
        "the server is shutting down: send the request again, to another server or later",
        status=503, kind="server_error", retry_after_s=RETRY_AFTER_S,
    )  # fmt: skip


def _more(_: Any) -> bool:
    return False


def _last(_: Any) -> bool:
    return True


def _plain(_: Any) -> None:
    return None
