"""An exception that ends one sequence alone: what its client is told, what the log says, how its neighbours go on.

Rank 0 alone chooses tokens and makes texts, so what it raises there leaves the ranks agreed: the sequence is evicted
with the next plan. What a model's pass raises is not contained. Neither logs nor answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb

import torch

from dsserve.core.errors import RequestError
from dsserve.sampling.grammar import GrammarError


@dataclass(frozen=True)
class Fault:
    """Why a sequence cannot go on.

    Attributes:
        cause: for the log; never holds a value, which may be a user's text.
        error: for the client; None = nothing more is known than that the server failed.
    """

    cause: str
    error: RequestError | None = None

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """The fault that an exception is. A library's may be a BaseException: a Rust panic is one.

        Raises:
            KeyboardInterrupt, SystemExit: the exception itself, where it means the process.
        """
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error
        return cls(describe(error), _told(error))


def describe(error: BaseException) -> str:
    """The type and the innermost place of an exception, without its message, which may hold a user's text."""
    name = type(error).__name__
    frames = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)]
    if not frames:
        return name
    code, line = frames[-1]
    return f"{name} at {Path(code.co_filename).name}:{line} ({code.co_name})"


def _told(error: BaseException) -> RequestError | None:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, GrammarError):
        return RequestError(
            "the text cannot go on: its grammar (response_format, or a demanded tool's parameters) allows no further "
            "token; simplify the schema",
            code="grammar_dead_end",
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError(
            "the device has no memory for the text's next token: try again later",
            status=507, kind="server_error", code="out_of_memory",
        )  # fmt: skip
    return None


def no_token(logits: torch.Tensor) -> Fault:
    """Why none can be chosen in a row.

    Args:
        logits: the model's own, `[V]`.
    """
    if logits.amax().isfinite():
        return Fault(
            "no token is left",
            RequestError(
                "no token is left that the text may go on with: its min_tokens, stop_token_ids, logit_bias, penalties "
                "and grammar rule out all of them together",
                code="no_token_left",
            ),
        )
    return Fault(
        "the model's logits are no numbers",
        RequestError(
            "the model's output is not a number here: the next token cannot be chosen",
            status=500, kind="internal_error", code="broken_logits",
        ),
    )  # fmt: skip


def attempt(rows: range, work: Callable[[range], None]) -> dict[int, Fault]:
    """Does the work for rows together; where that raises, for each half of them, down to those that raise alone.

    Args:
        work: must give a row the same, whatever rows it is done with, and however often.

    Returns:
        The rows that raise alone; for all others the work is done.
    """
    if not rows:
        return {}
    try:
        work(rows)
    except BaseException as error:
        fault = Fault.of(error)
    else:
        return {}
    if len(rows) == 1:
        return {rows.start: fault}
    half = len(rows) // 2
    return attempt(rows[:half], work) | attempt(rows[half:], work)
