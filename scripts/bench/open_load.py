"""A steady load: streaming requests that start at given moments, whether or not earlier ones were answered.

Unlike a closed loop (`client`) it does not slow down with the server, so waiting shows. One thread, raw sockets
under asyncio. Says of each request how it ended; compares no texts except where a reference is given.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.client import http_request

WHOLE, WRONG, REFUSED, LOST, CUT = "whole", "wrong", "refused", "lost", "cut"
OK_LINE = b"HTTP/1.1 200"
TIMEOUT_S = 300.0


@dataclass
class Answer:
    """One request. Times in seconds since the load began; None where the moment never came.

    `outcome`: whole (all tokens), wrong (whole, but not what was asked for), refused (a status other than 200), lost
    (no answer, or none with a token), cut (broke off, or ended with an error event, after its first token).
    """

    due_s: float
    first_s: float | None = None
    end_s: float | None = None
    outcome: str = LOST
    detail: str = ""

    @property
    def first_token_ms(self) -> float | None:
        return None if self.first_s is None else (self.first_s - self.due_s) * 1e3


@dataclass(frozen=True)
class Load:
    """What is sent: the moments (s, ascending), and for each of them one of the bodies, in turn.

    `texts`: the right text of each body, or None where only the number of tokens can be known (bf16).
    """

    moments: Sequence[float]
    bodies: Sequence[dict[str, Any]]
    texts: Sequence[str] | None = None


@dataclass
class Text:
    """What has come of a stream of completions."""

    text: str = ""
    tokens: int = 0
    reason: str | None = None
    failed: bool = False
    done: bool = False
    begun: bool = False

    def take(self, line: str) -> None:
        """One line of server-sent events. Raises ValueError for what is no event of a completion."""
        if not line.startswith("data: "):
            return
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        self.failed = self.failed or "error" in event
        self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)
        for choice in event.get("choices", []):
            self.begun = True
            self.text += choice["text"]
            self.reason = choice["finish_reason"] or self.reason


def poisson(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Moments of arrivals that do not know of each other, ascending, below `seconds`."""
    dice, moments, now = random.Random(seed), list[float](), 0.0
    while (now := now + dice.expovariate(rate_per_s)) < seconds:
        moments.append(now)
    return moments


def completion(prompt: str, tokens: int) -> dict[str, Any]:
    """Body of a streamed completion of exactly `tokens` tokens, greedy."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    return {"prompt": prompt, "max_tokens": tokens, **options}


async def send(
    host: str, port: int, path: str, load: Load, is_over: Callable[[], bool] = lambda: False
) -> list[Answer]:
    """Sends everything, each at its moment, and returns the answers in the same order; raises nothing of the network.

    Nothing is sent, and there are no answers, from the first moment on at which `is_over` is true.
    """
    started, sent = time.monotonic(), list[asyncio.Task[Answer]]()
    for index, moment in enumerate(load.moments):
        await asyncio.sleep(max(0.0, started + moment - time.monotonic()))
        if is_over():
            break
        number = index % len(load.bodies)
        right = load.texts[number] if load.texts else None
        sent.append(asyncio.create_task(ask(host, port, path, load.bodies[number], moment, started, right)))
    return list(await asyncio.gather(*sent))


async def ask(
    host: str, port: int, path: str, body: dict[str, Any], due_s: float, started: float, right: str | None
) -> Answer:
    """One request from its connection to its last byte."""
    answer, text = Answer(due_s), Text()

    def note(line: str) -> None:
        text.take(line)
        if text.begun and answer.first_s is None:
            answer.first_s = time.monotonic() - started

    try:
        status = await asyncio.wait_for(stream(host, port, http_request(host, path, body), note), TIMEOUT_S)
        answer.outcome = judge(text, body["max_tokens"], right) if status.startswith(OK_LINE) else REFUSED
        answer.detail = "" if status.startswith(OK_LINE) else status.decode(errors="replace")
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError, asyncio.TimeoutError) as error:
        answer.outcome, answer.detail = judge(text, body["max_tokens"], right), type(error).__name__
    answer.end_s = time.monotonic() - started
    return answer


async def stream(host: str, port: int, request: bytes, note: Callable[[str], None]) -> bytes:
    """Sends `request` and hands each line of a 200's chunked body to `note`. Returns the status line.

    Raises OSError, EOFError, ValueError for an answer that breaks off.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status, rest = head.split(b"\r\n")[0], b""
        while status.startswith(OK_LINE) and (size := int(await reader.readline(), 16)):
            *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
            for line in lines:
                note(line.decode())
        return status
    finally:
        writer.close()


def judge(text: Text, tokens: int, right: str | None) -> str:
    """How a stream that was not refused has ended."""
    if not text.done or text.failed:
        return CUT if text.begun else LOST
    fits = text.tokens == tokens and text.reason == "length" and right in (None, text.text)
    return WHOLE if fits else WRONG


def count(answers: Sequence[Answer]) -> dict[str, int]:
    """How many ended how; all outcomes are named."""
    found = Counter(answer.outcome for answer in answers)
    return {outcome: found[outcome] for outcome in (WHOLE, WRONG, REFUSED, LOST, CUT)}
