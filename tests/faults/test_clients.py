"""Clients that misbehave: they leave, say nonsense, send too much or do not read. Their neighbours must not notice."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest

from scripts.serve import processes
from scripts.serve.run_dir import HOST, Ports
from tests.faults.conftest import LONG, PROMPT, Victim, wait_until

MIB = 2**20


def request_bytes(victim: Victim, body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /predictions/{victim.record.name} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def connect(victim: Victim) -> socket.socket:
    return socket.create_connection((HOST, victim.record.port), timeout=60)


def live_requests(victim: Victim) -> int:
    return sum(int(path.read_text()) for path in (victim.run.path / "live").iterdir())


def usage(victim: Victim) -> dict[str, tuple[float, int]]:
    """Role -> resident MiB and open file descriptors."""
    return {
        processes.describe(item): (item.memory_info().rss / MIB, item.num_fds())
        for item in processes.find_marked(victim.run.path)
    }


def misbehave(victim: Victim, index: int) -> None:
    """One client that leaves at some moment: before, within or after its request, or within the reply."""
    dice = random.Random(index)
    request = request_bytes(victim, {**LONG, "max_new_tokens": 40, "stream": dice.random() < 0.7})
    kind = dice.randrange(4)
    with suppress(OSError), connect(victim) as client:
        if kind == 0:
            return
        if kind == 1:
            client.sendall(request[: dice.randrange(len(request))])
            return
        client.sendall(request)
        if kind == 2:
            time.sleep(dice.random() * 0.3)
            return
        for _ in range(dice.randrange(1, 4)):
            client.recv(512)
        # A reset instead of an orderly end.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.long
def test_a_thousand_clients_that_disconnect_at_random(victim: Victim, measured: Callable[..., None]) -> None:
    victim.wait_until_served(60)
    with ThreadPoolExecutor(64) as pool:  # the first wave is what a busy server holds anyway
        list(pool.map(lambda index: misbehave(victim, index), range(128)))
    victim.wait_until_served(120)
    before = usage(victim)
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda index: misbehave(victim, index), range(1000)))
    seconds = victim.wait_until_served(120)
    wait_until(lambda: live_requests(victim) == 0, 30)
    after = usage(victim)
    measured(served_again_after=seconds, rank_0_grew_mib=after["rank 0"][0] - before["rank 0"][0])
    assert set(after) == set(before)
    for role in ("rank 0", "rank 1", "torchrun"):
        assert after[role][1] <= before[role][1] + 2, role
        assert after[role][0] < before[role][0] + 64, role
    assert after["TorchServe"][1] < before["TorchServe"][1] + 80


MALFORMED = [
    b"\x00" * 64,
    b"GET\r\n\r\n",
    b"POST /predictions/victim HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /predictions/victim HTTP/1.1\r\nContent-Length: many\r\n\r\n{}",
    b"POST /predictions/victim HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /predictions/victim HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"POST /predictions/" + b"v" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /predictions/victim HTTP/9.9\r\n\r\n",
    b"POST /predictions/%00%0a[METRICS]Forged.Count:1 HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 200,  # TLS to a plain port
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /predictions/victim HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{",  # and then silence
]


@pytest.mark.long
def test_malformed_http_leaves_running_streams_alone(victim: Victim) -> None:
    victim.wait_until_served(60)
    body = {"prompt": "The history of the lighthouse begins", "max_new_tokens": 60}
    alone = victim.text(body)
    stream = victim.stream(body).wait_for_tokens()
    silent = []
    for data in MALFORMED:
        client = connect(victim)
        with suppress(OSError):
            client.sendall(data)
        silent.append(client)
    stream.join()
    for client in silent:
        client.close()
    assert "".join(json.loads(event)["text"] for event in stream.events[:-1]) == alone
    assert victim.text(PROMPT) == victim.expected()
    assert "Forged" not in victim.worker_log()
    ports = Ports(victim.record.port)
    for port in (ports.metrics, ports.server_metrics):
        assert "Forged" not in httpx.get(f"http://{HOST}:{port}/metrics", timeout=30).text


@pytest.mark.long
def test_bodies_of_10_mb_are_refused_and_cost_nobody_anything(victim: Victim) -> None:
    victim.wait_until_served(60)
    stream = victim.stream({**LONG, "max_new_tokens": 100}).wait_for_tokens()

    def send(size: int) -> int | None:
        with suppress(httpx.HTTPError):  # TorchServe closes the connection while the client still sends
            return httpx.post(
                victim.url, content=b"x" * size, headers={"content-type": "text/plain"}, timeout=60
            ).status_code
        return None

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(send, [10 * MIB] * 8)) <= {413, None}
    assert send(MIB - 1000) == 413  # within TorchServe's limit: the handler's own answer, the context is full
    assert stream.join().events[-1] == "[DONE]"
    assert victim.text(PROMPT) == victim.expected()


@pytest.mark.long
def test_clients_that_do_not_read_stop_nobody_else(victim: Victim) -> None:
    victim.wait_until_served(60)
    slow = []
    for _ in range(15):  # all slots but one
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect((HOST, victim.record.port))
        client.sendall(request_bytes(victim, {**LONG, "stream": True}))
        slow.append(client)
    time.sleep(2)
    assert victim.text(PROMPT) == victim.expected()
    for client in slow:
        client.close()
    assert victim.text(PROMPT) == victim.expected()
    assert psutil.Process(victim.record.pid).memory_info().rss < 2000 * MIB
