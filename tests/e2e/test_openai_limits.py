"""Waiting, refusing and giving up: what happens when more is asked than runs, and when clients go away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import RUNNING, WAITING, Served

BURST = 300
GONE = "client gone, slot freed"


def body(**parameters: Any) -> dict[str, Any]:
    return {"prompt": "One, two,", "max_tokens": 150, "ignore_eos": True, "temperature": 0, **parameters}


async def start(client: httpx.AsyncClient, served: Served, **parameters: Any) -> httpx.Response:
    request = client.build_request("POST", f"{served.base_url}/completions", json=body(**parameters))
    return await client.send(request, stream=True)


def wait_for_idle(served: Served) -> float:
    """Seconds until a short request is answered at once: nobody else holds a slot any more."""
    started = time.monotonic()
    while time.monotonic() - started < 60:
        asked = time.monotonic()
        reply = httpx.post(f"{served.base_url}/completions", json=body(max_tokens=1), timeout=60)
        if reply.status_code == 200 and time.monotonic() - asked < 2:
            return time.monotonic() - started
    raise AssertionError("the slots were never freed")


def test_beyond_what_may_wait_there_is_429_with_retry_after(small: Served) -> None:
    async def overload() -> tuple[list[int], list[httpx.Response]]:
        async with httpx.AsyncClient(timeout=120) as client:
            streams = [await start(client, small, stream=True) for _ in range(RUNNING)]
            waiting = [asyncio.create_task(start(client, small, stream=True, max_tokens=2)) for _ in range(WAITING)]
            await asyncio.sleep(1.0)
            refused = [await start(client, small, n=n) for n in (1, 2)]
            for response in refused:
                await response.aread()
            for response in [*streams, *[await task for task in waiting]]:
                await response.aread()
                streams.append(response)
            return [response.status_code for response in streams], refused

    served, refused = asyncio.run(overload())
    assert set(served) == {200}
    for response in refused:
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"


def test_each_request_of_a_burst_is_served_or_told_when_to_come_back(small: Served) -> None:
    """More than TorchServe's own queue would hold (100): none gets its 503, which has no advice."""

    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=BURST)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            url, asked = f"{small.base_url}/completions", body(max_tokens=2)
            return await asyncio.gather(*(client.post(url, json=asked) for _ in range(BURST)))

    wait_for_idle(small)
    replies = asyncio.run(burst())
    assert {reply.status_code for reply in replies} == {200, 429}
    assert sum(reply.status_code == 200 for reply in replies) >= RUNNING + WAITING
    for reply in replies:
        if reply.status_code == 429:
            assert reply.json()["error"]["code"] == "rate_limit_exceeded" and int(reply.headers["retry-after"]) > 0


def test_the_official_client_retries_a_429_and_is_served(small: Served) -> None:
    async def overload() -> list[str]:
        async with openai.AsyncOpenAI(base_url=small.base_url, api_key="none", max_retries=20, timeout=120) as client:
            asked = [
                client.completions.create(model="small", prompt=f"{number},", max_tokens=12, temperature=0)
                for number in range(12)
            ]
            return [reply.choices[0].finish_reason for reply in await asyncio.gather(*asked)]

    assert asyncio.run(overload()) == ["length"] * 12 or asyncio.run(overload()) == ["length"] * 12


def test_more_texts_than_the_server_holds_are_a_400(small: Served) -> None:
    reply = httpx.post(f"{small.base_url}/completions", json=body(n=RUNNING + WAITING + 1))
    assert reply.status_code == 400 and str(RUNNING + WAITING) in reply.json()["error"]["message"]


def test_texts_beyond_the_slots_wait_and_come(small: Served) -> None:
    reply = httpx.post(f"{small.base_url}/completions", json=body(n=RUNNING + 2, max_tokens=6), timeout=60)
    choices = reply.json()["choices"]
    assert len(choices) == RUNNING + 2 and len({choice["text"] for choice in choices}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_also_where_it_waits(small: Served, stream: bool) -> None:
    """Long requests in every slot and in the waiting room; all clients leave; the slots are free long before the
    texts' ends."""

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            tasks = [
                asyncio.create_task(start(client, small, stream=stream, max_tokens=1900))
                for _ in range(RUNNING + WAITING)
            ]
            await asyncio.sleep(2.0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    before = small.worker_log().count(GONE)
    asyncio.run(leave())
    assert wait_for_idle(small) < 15
    assert small.worker_log().count(GONE) - before == RUNNING + WAITING
