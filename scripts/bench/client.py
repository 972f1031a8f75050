"""A load client that hardly uses the CPU: raw sockets, one thread, a time stamp for every piece that arrives.

Sends N streaming requests at once and reads their server-sent events. Parses only when all answers are complete, so
that the client does not take the cores from the model it measures.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

RECEIVE_BYTES = 65536
DONE = b"[DONE]"
LAST_CHUNK = b"\r\n0\r\n\r\n"


class BenchError(Exception):
    """An answer that cannot be counted; the message says why."""


@dataclass
class Stream:
    """One request: when it was sent and every piece of its answer (seconds of the monotonic clock, bytes)."""

    sent_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def is_complete(self) -> bool:
        """The last chunk of a chunked body is there, however it was cut into pieces."""
        return b"".join(data for _, data in self.pieces[-len(LAST_CHUNK) :]).endswith(LAST_CHUNK)


@dataclass(frozen=True)
class Round:
    """What one round of concurrent requests showed. Times in milliseconds."""

    tokens_per_s: float
    first_token_ms: list[float]
    token_ms: list[float]
    gap_ms: list[float]


def run_round(
    host: str,
    port: int,
    path: str,
    prompts: list[str],
    new_tokens: int,
    sampling: dict[str, Any] | None = None,
    timeout_s: float = 300,
) -> Round:
    """Send one streaming request for each prompt, all at once, and measure; greedy without `sampling`.

    Raises BenchError.
    """
    common = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True, **(sampling or {})}
    bodies = [{"prompt": prompt, **common} for prompt in prompts]
    try:
        streams = receive_all(host, port, [http_request(host, path, body) for body in bodies], timeout_s)
    except OSError as error:
        raise BenchError(f"http://{host}:{port}{path}: {error}") from None
    return summarise(streams, new_tokens)


def http_request(host: str, path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a POST. TorchServe closes the connection after a whole reply, but not after a stream."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def receive_all(host: str, port: int, requests: list[bytes], timeout_s: float) -> list[Stream]:
    """Send all requests, then collect all answers to their last chunk or the end of the connection. Raises OSError."""
    selector = selectors.DefaultSelector()
    connections = [socket.create_connection((host, port), timeout=timeout_s) for _ in requests]
    try:
        streams = []
        for connection, request in zip(connections, requests, strict=True):
            streams.append(Stream(time.perf_counter()))
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, streams[-1])
        deadline = time.monotonic() + timeout_s
        while selector.get_map():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete answer within {timeout_s:.0f} s")
            for key, _ in selector.select(timeout=1):
                data = key.fileobj.recv(RECEIVE_BYTES)  # type: ignore[union-attr]
                if data:
                    key.data.pieces.append((time.perf_counter(), data))
                if not data or key.data.is_complete():
                    selector.unregister(key.fileobj)
        return streams
    finally:
        for connection in connections:
            connection.close()
        selector.close()


def summarise(streams: list[Stream], new_tokens: int) -> Round:
    """Rates and times of one round. Raises BenchError unless every answer has exactly `new_tokens` tokens."""
    first, per_token, gaps, ends = [], [], [], []
    for stream in streams:
        check_answer(stream, new_tokens)
        # A piece without an event is a header or the end of the chunked body.
        arrivals = [at for at, data in stream.pieces if b"data: " in data]
        end = next(at for at, data in reversed(stream.pieces) if b"data: " in data or DONE in data)
        first.append((arrivals[0] - stream.sent_s) * 1e3)
        per_token.append((end - arrivals[0]) * 1e3 / (new_tokens - 1))
        gaps += [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(arrivals)]
        ends.append(end)
    wall_s = max(ends) - min(stream.sent_s for stream in streams)
    return Round(len(streams) * new_tokens / wall_s, first, per_token, gaps)


def check_answer(stream: Stream, new_tokens: int) -> None:
    """Raises BenchError if the answer was refused, broke off or ended early."""
    head, _, body = b"".join(data for _, data in stream.pieces).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"refused: {head.splitlines()[0].decode(errors='replace') if head else 'no answer'}")
    if b"transfer-encoding: chunked" in head.lower():
        body = join_chunks(body)
    events = [line[len("data: ") :] for line in body.decode("utf-8").split("\n") if line.startswith("data: ")]
    if not events or events[-1] != DONE.decode():
        raise BenchError("the stream broke off before [DONE]")
    last = json.loads(events[-2])
    if last.get("finish_reason") != "length" or last["usage"]["completion_tokens"] != new_tokens:
        raise BenchError(f"an answer ended early ({last.get('finish_reason')}, {last.get('usage')})")


def join_chunks(body: bytes) -> bytes:
    """Content of a chunked HTTP body."""
    content, rest = b"", body
    while rest:
        size_line, _, rest = rest.partition(b"\r\n")
        size = int(size_line.split(b";")[0] or b"0", 16)
        if size == 0:
            break
        content, rest = content + rest[:size], rest[size + 2 :]
    return content
