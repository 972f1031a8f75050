"""Errors that are no fault of the request: the server ends, is full or busy, was too slow, or failed.

Only what they say; when they are given is `worker.live_batch`'s affair.
"""

from __future__ import annotations

from dsserve.core.errors import RETRY_AFTER_S, RequestError

INTERNAL = "internal_error"
_RETRY_WHEN_FULL_S = 1


def draining() -> RequestError:
    """For a request that arrives while the server ends."""
    return RequestError(
        "the server is shutting down: send the request again, to another server or later",
        status=503, kind="server_error", retry_after_s=RETRY_AFTER_S,
    )  # fmt: skip


def full(asked: int, running: int, waiting: int, places: int) -> RequestError:
    """For a request whose texts find no place among those that run or wait.

    Args:
        asked: texts of the request.
        places: most texts of all requests together.
    """
    free = max(places - running - waiting, 0)
    fewer = ", or ask for fewer texts (prompts x n) at a time" if free else ""
    return _later(
        f"the request asks for {asked} text(s) and {free} of {places} places are free ({running} run, {waiting} wait): "
        f"try again later{fewer}"
    )


def busy(seconds: float) -> RequestError:
    """For a request behind others whose reading took too long."""
    return _later(f"the server has been reading requests for {seconds:g} s, and streams wait: try again later")


def too_busy_to_compile(param: str) -> RequestError:
    """For a schema that may be good, and that a busy machine did not compile in time."""
    return _later(f"{param}: the server is too busy to compile the schema: try again later", param)


def _later(message: str, param: str | None = None) -> RequestError:
    return RequestError(
        message, status=429, param=param, kind="rate_limit_error", code="rate_limit_exceeded",
        retry_after_s=_RETRY_WHEN_FULL_S,
    )  # fmt: skip


def overdue(seconds: float) -> RequestError:
    """For a request that did not end in its time."""
    return RequestError(
        f"the request did not end within {seconds:g} s: raise `timeout`, ask for fewer tokens, or try again later",
        status=504, param="timeout", kind="timeout_error", code="timeout",
    )  # fmt: skip


def unreadable() -> RequestError:
    """For a request whose reading raised something that was not foreseen."""
    return RequestError("the request could not be read", status=500, kind=INTERNAL)


def failed() -> RequestError:
    """For a request that broke while its text was made."""
    return RequestError("the server failed on this request", status=500, kind=INTERNAL)
