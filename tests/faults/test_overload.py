"""More requests than a server can take: some are served, the others are told at once, memory stays flat."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.serve import processes, server
from tests.faults.conftest import PROMPT, Victim, start_victim, wait_until

pytestmark = pytest.mark.long

MIB = 2**20
CLIENTS = 260  # more than a call has rows: the others wait for the next one
WARM_S, CROWDED_S = 20, 60
RETRY_S = 0.05  # these clients do not heed Retry-After


@pytest.fixture
def crowded(smollm2: Path, tmp_path: Path) -> Iterator[Victim]:
    victim = start_victim(tmp_path, "crowded", smollm2, max_running=4, max_waiting=8)
    yield victim
    assert server.stop(victim.run) == 0


def usage(victim: Victim) -> dict[str, tuple[float, int]]:
    """Role -> resident MiB and open file descriptors."""
    found = processes.find_marked(victim.run.path)
    return {processes.describe(item): (item.memory_info().rss / MIB, item.num_fds()) for item in found}


def check(reply: httpx.Response, expected: str) -> None:
    """A right text, or our own 429 with its advice; never TorchServe's 503, which has none."""
    if reply.status_code == 200:
        assert reply.json()["text"] == expected
    else:
        assert reply.status_code == 429, reply.text
        assert reply.headers["retry-after"] == "1" and reply.json()["error"]["code"] == "rate_limit_exceeded"


async def crowd(victim: Victim, expected: str, seconds: float) -> Counter[int]:
    """Statuses of what CLIENTS clients get who ask again and again."""
    statuses, until = Counter[int](), time.monotonic() + seconds

    async def ask(client: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            reply = await client.post(victim.url, json=PROMPT)
            check(reply, expected)
            statuses[reply.status_code] += 1
            if reply.status_code != 200:
                await asyncio.sleep(RETRY_S)

    limits: Any = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(CLIENTS)))
    return statuses


def test_sustained_overload(crowded: Victim, measured: Callable[..., None]) -> None:
    expected = crowded.expected()
    asyncio.run(crowd(crowded, expected, WARM_S))
    before = usage(crowded)
    statuses = asyncio.run(crowd(crowded, expected, CROWDED_S))
    after = usage(crowded)
    grown = {role: after[role][0] - before[role][0] for role in before}
    measured(
        served=statuses[200], got_429=statuses[429],
        **{f"{role.replace(' ', '_')}_grew_mib": mib for role, mib in grown.items()},
    )  # fmt: skip
    assert set(after) == set(before) and set(statuses) <= {200, 429}
    assert statuses[200] > 0 and statuses[429] > statuses[200]
    assert max(grown["rank 0"], grown["rank 1"], grown["torchrun"]) < 32
    assert grown["TorchServe"] < 256  # its heap may grow up to 1 GiB before it is swept
    wait_until(lambda: crowded.text(PROMPT) == expected, 60)
    assert usage(crowded)["rank 0"][1] <= before["rank 0"][1] + 2
