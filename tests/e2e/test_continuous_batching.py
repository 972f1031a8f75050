"""Requests side by side: each gets the tokens it gets alone, and one that leaves costs nobody anything."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.e2e.conftest import Served, parse

WORDS = ["river", "ran", "past", "seven", "old", "houses", "while", "nobody", "counted", "boats", "or", "birds"]


def mixed_requests(count: int) -> list[dict]:
    """Prompts of 1 to about 160 words and outputs of 1 to 48 tokens, always the same ones."""
    dice = random.Random(0)
    bodies = []
    for index in range(count):
        length = 1 if index == 0 else dice.randint(1, 160)
        prompt = " ".join(dice.choice(WORDS) for _ in range(length))
        bodies.append({"prompt": prompt, "max_new_tokens": 1 if index == 1 else dice.randint(4, 48)})
    return bodies


def test_sixteen_at_once_are_each_equal_to_their_run_alone(fp32: Served) -> None:
    bodies = mixed_requests(16)
    alone = [answer(fp32, body) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(partial(answer, fp32), bodies)) == alone


@pytest.mark.long
def test_two_hundred_short_requests_at_once_are_all_answered(fp32: Served) -> None:
    """By the default settings: more than run at a time, and more than TorchServe's own queue holds by default."""
    bodies = [{"prompt": f"{WORDS[at % len(WORDS)]} {at}", "max_new_tokens": 4} for at in range(200)]
    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(fp32.ask, bodies))
    assert {reply.status_code for reply in replies} == {200}
    some = random.Random(2).sample(range(200), 12)
    assert [replies[at].json()["text"] for at in some] == [fp32.text(bodies[at]) for at in some]


def answer(server: Served, body: dict) -> dict:
    """The reply without the count of reused tokens: that one depends on what ran before."""
    reply = server.ask(body).json()
    del reply["usage"]["prompt_tokens_details"]
    return reply


def test_arrivals_in_mid_stream_change_nothing(fp32: Served) -> None:
    """Many requests, arriving at random moments, half of them streaming."""
    bodies = mixed_requests(24)
    alone = [fp32.text(body) for body in bodies]
    dice = random.Random(1)
    delays = [dice.uniform(0, 2) for _ in bodies]

    def run(index: int) -> str:
        time.sleep(delays[index])
        if index % 2:
            return "".join(event["text"] for event in parse(fp32.events(bodies[index])))
        return fp32.text(bodies[index])

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(run, range(len(bodies)))) == alone


def test_a_client_that_disconnects_frees_its_row(fp32: Served) -> None:
    """As many endless streams as slots, all cut: the next request must not wait for any of them."""
    before = fp32.worker_log().count("client gone, slot freed")
    endless = {"prompt": "Once upon a time", "max_new_tokens": 2000, "stream": True}

    def cut() -> None:
        with httpx.stream("POST", fp32.url, json=endless, timeout=120) as response:
            next(response.iter_raw())

    threads = [threading.Thread(target=cut) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = time.monotonic()
    assert fp32.ask({"prompt": "Hello", "max_new_tokens": 2}).status_code == 200
    assert time.monotonic() - started < 30
    gone = fp32.worker_log().count("client gone, slot freed") - before
    assert gone == 16


def test_a_bad_request_leaves_running_streams_alone(fp32: Served) -> None:
    body = {"prompt": "The history of the lighthouse begins", "max_new_tokens": 60}
    alone = fp32.text(body)
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(fp32.events, body)
        while not stream.done():
            assert fp32.ask({"prompt": "x", "max_new_tokens": 0}).status_code == 400
            assert httpx.post(fp32.url, content=b"\xff\xfe", timeout=60).status_code == 400
        assert "".join(event["text"] for event in parse(stream.result())) == alone
