"""A reply of any length leaves in pieces that TorchServe takes, in order and whole, while streams beside it go on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsserve.core.request import TokenEvent
from dsserve.protocol.bounds import CALL_BYTES, FRAME_BYTES, Bound
from dsserve.worker import live_batch
from tests.contract.rank0 import Worker, body, done

TORCHSERVES_OWN = 6_553_500
MOST = 1000


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FRAME_BYTES.most < TORCHSERVES_OWN
    monkeypatch.setattr(live_batch, "FRAME_BYTES", Bound("bytes", MOST))
    monkeypatch.setattr(live_batch, "CALL_BYTES", Bound("bytes", 3 * MOST))
    monkeypatch.setattr(live_batch, "SHARE_BYTES", 100)


def drain(worker: Worker, name: str, first: tuple[Any, ...], beside: str = "") -> tuple[bytes, int]:
    """All pieces of a reply whose first one has come, and how many there were."""
    item, _, _, more = first
    whole, pieces = item, 1
    while more == "true":
        assert len(item) <= MOST
        rows = {name: {}, **({beside: {}} if beside else {})}
        replies = worker.call(rows, [TokenEvent(beside, "y")] if beside else [])
        if beside:
            assert replies[beside][0] == b'data: {"text":"y"}\n\n'
        item, _, _, more = replies[name]
        whole, pieces = whole + item, pieces + 1
    assert len(item) <= MOST
    return whole, pieces


def test_a_whole_reply_in_one_call(worker: Worker) -> None:
    text = "z" * (5 * MOST)
    worker.call({"s": body(stream=True)})
    first = worker.call({"s": {}, "a": body()}, [done("a", text)])["a"]
    assert first[1:] == (200, "application/json", "true")
    whole, pieces = drain(worker, "a", first, beside="s")
    assert json.loads(whole)["text"] == text and pieces == 6
    assert worker.batch.live == 1


@pytest.mark.parametrize("length", [MOST - 1, MOST, MOST + 1, 2 * MOST])
def test_no_piece_is_empty_and_the_last_one_ends_the_reply(worker: Worker, length: int) -> None:
    around = len(worker.call({"a": body()}, [done("a")])["a"][0])
    first = worker.call({"b": body()}, [done("b", "z" * (length - around))])["b"]
    whole, pieces = drain(worker, "b", first)
    assert len(whole) == length and pieces == -(-length // MOST)
    assert worker.batch.live == 0


def test_a_stream_that_gets_much_at_once(worker: Worker) -> None:
    worker.call({"a": body(stream=True)})
    events = [TokenEvent("a", "z" * 300) for _ in range(20)]
    whole, _ = drain(worker, "a", worker.call({"a": {}}, [*events, done("a")])["a"])
    blocks = whole.decode().split("\n\n")
    assert "".join(json.loads(block[6:])["text"] for block in blocks[:-2]) == "z" * 6000
    assert blocks[-2] == "data: [DONE]"


def test_an_answer_without_generation(worker: Worker) -> None:
    asked = {"body": {"tokens": [1] * 60}}
    worker.served.tokenizer.decode = lambda ids, **_: "hello" * 1000
    first = worker.call({"a": asked}, path="v1/detokenize")["a"]
    assert first[1:] == (200, "application/json", "true")
    whole, pieces = drain(worker, "a", first)
    assert json.loads(whole)["prompt"] == "hello" * 1000 and pieces == 6


def test_the_rest_of_a_reply_does_not_wait_for_long_calls_and_a_client_may_leave(worker: Worker) -> None:
    worker.call({"a": body(), "b": body()}, [done("a", "z" * 3 * MOST)])
    worker.call({"a": {}, "b": {}})
    assert worker.engine.limits_s[-1] == 0
    worker.call({"b": {}})
    assert worker.batch.live == 1


def test_what_is_left_when_the_time_is_over_still_goes_out(worker: Worker, clock: list[float]) -> None:
    first = worker.call({"a": body(timeout=5)}, [done("a", "z" * 3 * MOST)])["a"]
    clock[0] += 100
    whole, _ = drain(worker, "a", first)
    assert json.loads(whole)["text"] == "z" * 3 * MOST


def test_many_long_replies_share_a_call_and_short_ones_do_not_wait(worker: Worker) -> None:
    names = [f"r{at}" for at in range(9)]
    events = [done(name, "z" * 5 * MOST) for name in names]
    worker.call({"s": body(stream=True)})
    rows = {name: body() for name in names} | {"s": {}}
    found = worker.call(rows, [*events, TokenEvent("s", "y")])
    whole, live = {name: found[name][0] for name in names}, dict.fromkeys(names)
    for _ in range(100):
        assert sum(len(found[name][0]) for name in live) <= 3 * MOST + 9 * 100
        assert found["s"][0] == b'data: {"text":"y"}\n\n'
        live = {name: None for name in live if found[name][3] == "true"}
        if not live:
            break
        found = worker.call({**{name: {} for name in live}, "s": {}}, [TokenEvent("s", "y")])
        for name in live:
            whole[name] += found[name][0]
    assert all(json.loads(text)["text"] == "z" * 5 * MOST for text in whole.values())
    assert CALL_BYTES.most > FRAME_BYTES.most
