"""The two kinds of error that people see: a load that cannot succeed, and a request that cannot be answered.

Covers only the types, and a library's error in one line; who turns them into log lines or HTTP replies is the handler
and `protocol.reply`.
"""

from __future__ import annotations

# For requests that a broken engine could not answer: the worker may be back by then.
RETRY_AFTER_S = 10


def first_line(error: BaseException) -> str:
    """What a library's error says first, its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class LoadError(ValueError):
    """The model cannot be served as configured.

    The message is one line that names the file and the key and says how to mend it. It is a `ValueError`
    because TorchServe answers `RuntimeError` at load with a bare "Unknown exception".
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RequestError(Exception):
    """One request cannot be answered; its neighbours are not concerned.

    Args:
        message: What is wrong and how to mend it. It goes back to the sender only, never into a log.
        status: The HTTP status, 400 to 599.
        param: The request parameter at fault, where there is one.
        kind: The `type` of the error object, as OpenAI names them.
        code: A short name that programs can tell errors apart by, as OpenAI has them.
        retry_after_s: Seconds after which the same request may succeed, the `Retry-After` header.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.kind = kind
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The reply's JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
