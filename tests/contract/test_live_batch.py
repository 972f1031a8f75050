"""Rank 0's side of TorchServe's continuous-batching contract, with TorchServe's own context and encoder."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsserve.core.errors import RequestError
from dsserve.core.request import TokenEvent
from dsserve.sampling.grammar import GrammarError
from tests.contract.rank0 import Worker, body, done, served_model


def test_a_stream_has_first_middle_and_last_frames(worker: Worker) -> None:
    first = worker.call({"a": body(stream=True)}, [TokenEvent("a", "one")])["a"]
    assert first == (b'data: {"text":"one"}\n\n', 200, "text/event-stream; charset=utf-8", "true")
    middle = worker.call({"a": {}}, [TokenEvent("a", "two"), TokenEvent("a", "three")])["a"]
    assert middle[0] == b'data: {"text":"two"}\n\ndata: {"text":"three"}\n\n' and middle[3] == "true"
    last = worker.call({"a": {}}, [done("a", "four")])["a"]
    assert last[3] == "false" and last[0].endswith(b"data: [DONE]\n\n")


def test_a_stream_that_ends_in_its_first_call_is_a_plain_reply(worker: Worker) -> None:
    item, status, content_type, stream_next = worker.call({"a": body(stream=True)}, [done("a", "all")])["a"]
    assert stream_next is None and status == 200 and content_type.startswith("text/event-stream")
    assert item.startswith(b'data: {"text":"all"}') and item.endswith(b"[DONE]\n\n")


def test_a_json_reply_is_empty_frames_and_then_the_whole(worker: Worker) -> None:
    first = worker.call({"a": body()}, [TokenEvent("a", "one ")])["a"]
    assert first == (b"", 200, "application/json", "true")
    last = worker.call({"a": {}}, [done("a", "two", "length")])["a"]
    assert last[3] == "false"
    assert json.loads(last[0]) == {
        "text": "one two",
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_refused_rows_cost_their_neighbours_nothing(worker: Worker) -> None:
    rows = {"bad": body(top_p=7), "good": body(stream=True), "none": {}}
    replies = worker.call(rows, [TokenEvent("good", "x")])
    assert replies["bad"][1] == 400 and replies["bad"][3] is None
    assert json.loads(replies["bad"][0])["error"]["param"] == "top_p"
    assert replies["none"][1] == 400
    assert replies["good"] == (b'data: {"text":"x"}\n\n', 200, "text/event-stream; charset=utf-8", "true")
    assert [request.request_id for request in worker.engine.admitted] == ["good"]


def test_a_call_of_nothing_but_refused_rows_still_runs_the_engine(worker: Worker) -> None:
    """The engine's step is the collective without which other ranks lose calls."""
    worker.call({"bad": {}})
    assert worker.engine.calls == 1


def test_calls_are_short_while_somebody_streams_and_while_requests_come_often(
    worker: Worker, clock: list[float]
) -> None:
    worker.call({"a": body()})
    clock[0] += 10
    worker.call({"a": {}, "b": body(stream=True), "c": body()}, [done("b")])
    worker.call({"a": {}, "c": {}})
    assert worker.engine.limits_s == [0.5, 0.15, 0.5]
    live = {"a": {}, "c": {}}
    for name in map(str, range(30)):
        clock[0] += 0.02
        worker.call({**live, name: body()}, [done(name)])
    assert 0.01 <= worker.engine.limits_s[-1] < 0.02
    worker.engine.running, worker.engine.waiting = 1, 1  # two slots: who comes now waits anyway
    worker.call(live)
    assert worker.engine.limits_s[-1] == 0.5


def test_a_client_that_is_missing_is_evicted_once(worker: Worker) -> None:
    worker.call({"a": body(stream=True), "b": body(stream=True)}, [TokenEvent("a", "x"), TokenEvent("b", "y")])
    worker.call({"b": {}}, [TokenEvent("b", "z")])
    assert worker.engine.evicted == ["a"]
    worker.call({"b": {}}, [done("b")])
    worker.call({"c": body()})
    assert worker.engine.evicted == ["a"]


def test_late_events_of_a_client_that_left_are_dropped(worker: Worker) -> None:
    worker.call({"a": body(stream=True), "b": body()}, [TokenEvent("a", "x")])
    reply = worker.call({"b": {}}, [TokenEvent("a", "late"), TokenEvent("b", "z")])["b"]
    assert reply[0] == b""


def test_rows_may_change_places_between_calls(worker: Worker) -> None:
    worker.call({"a": body(stream=True), "b": body(stream=True)}, [TokenEvent("a", "x"), TokenEvent("b", "y")])
    replies = worker.call({"b": {}, "a": {}}, [TokenEvent("a", "1"), TokenEvent("b", "2")])
    assert (replies["a"][0], replies["b"][0]) == (b'data: {"text":"1"}\n\n', b'data: {"text":"2"}\n\n')


def test_a_tokenizer_that_fails_on_one_prompt_refuses_only_that_request(worker: Worker) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    served = worker.batch._served
    worker.batch._served = served_model(fail, served.limits)
    broken = worker.call({"a": body()})["a"]
    assert broken[1] == 500 and json.loads(broken[0])["error"]["type"] == "internal_error"
    worker.batch._served = served
    assert worker.call({"b": body()}, [done("b", "x")])["b"][1] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_breaks_in_mid_stream_says_so_and_ends(worker: Worker, stream: bool) -> None:
    worker.call({"a": body(stream=stream)}, [TokenEvent("a", "x")])
    item, _, _, stream_next = worker.call({"a": {}}, [TokenEvent("a", "", failed=True)])["a"]
    assert stream_next == "false"
    payload = item.decode().removeprefix("data: ").split("\n\n")[0]
    assert json.loads(payload)["error"]["type"] == "internal_error"
    assert item.endswith(b"[DONE]\n\n") is stream


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_breaks_in_its_first_call_gets_the_status(worker: Worker, stream: bool) -> None:
    error = RequestError("restarting", status=503, kind="server_error", retry_after_s=10)
    event = TokenEvent("a", "", failed=True, error=error)
    item, status, content_type, stream_next = worker.call({"a": body(stream=stream)}, [event])["a"]
    assert (status, content_type, stream_next) == (503, "application/json", None)
    assert json.loads(item)["error"] == {"message": "restarting", "type": "server_error", "param": None, "code": None}
    assert worker.ctx.get_response_headers(0)["Retry-After"] == "10"
    assert worker.batch.live == 0


def test_a_server_that_drains_refuses_new_requests_and_finishes_the_old(worker: Worker) -> None:
    worker.call({"a": body(stream=True)}, [TokenEvent("a", "x")])
    worker.draining = True
    replies = worker.call({"a": {}, "b": body()}, [TokenEvent("a", "y")])
    assert replies["a"][0] == b'data: {"text":"y"}\n\n' and replies["a"][3] == "true"
    assert replies["b"][1] == 503 and json.loads(replies["b"][0])["error"]["type"] == "server_error"
    assert worker.ctx.get_response_headers(1)["Retry-After"]
    assert [request.request_id for request in worker.engine.admitted] == ["a"]
    assert worker.batch.live == 1
    worker.call({"a": {}}, [done("a")])
    assert worker.batch.live == 0


@pytest.mark.parametrize(("parameters", "seconds"), [({"timeout": 5}, 5), ({}, 600)])
def test_a_request_is_given_up_at_its_deadline_and_not_before(
    worker: Worker, clock: list[float], parameters: dict[str, Any], seconds: float
) -> None:
    worker.call({"a": body(**parameters), "b": body(stream=True, **parameters)})
    clock[0] += 1
    worker.call({"a": {}, "b": {}, "c": body(**parameters)})
    clock[0] += seconds - 1.01
    worker.call({"a": {}, "b": {}, "c": {}}, [TokenEvent("b", "x")])
    assert worker.engine.evicted == [] and worker.batch.live == 3
    clock[0] += 0.01
    replies = worker.call({"a": {}, "b": {}, "c": {}}, [TokenEvent("b", "y")])
    assert worker.engine.evicted == ["a", "b"] and replies["c"][3] == "true"
    assert replies["a"][3] == replies["b"][3] == "false"
    assert json.loads(replies["a"][0])["error"]["code"] == "timeout"
    events = replies["b"][0].decode().split("\n\n")
    assert events[0] == 'data: {"text":"y"}' and events[2] == "data: [DONE]"
    assert json.loads(events[1].removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_a_deadline_that_passes_in_the_first_call_is_a_504(worker: Worker, clock: list[float]) -> None:
    worker.engine.run = lambda max_steps, limit_s: clock.__setitem__(0, clock[0] + 2) or []  # type: ignore[method-assign,func-returns-value]
    item, status, _, stream_next = worker.call({"a": body(timeout=1, stream=True), "b": body(timeout=3)})["a"]
    assert (status, stream_next) == (504, None) and json.loads(item)["error"]["param"] == "timeout"
    assert worker.engine.evicted == ["a"] and worker.batch.live == 1


def test_an_answer_that_is_complete_at_the_deadline_is_sent(worker: Worker, clock: list[float]) -> None:
    worker.call({"a": body(timeout=1)})
    clock[0] += 2
    item, _, _, stream_next = worker.call({"a": {}}, [done("a", "all")])["a"]
    assert stream_next == "false" and json.loads(item)["text"] == "all"


@pytest.mark.parametrize(("timeout", "word"), [(601, "at most 600 s"), (0, "greater than 0"), ("5", "number")])
def test_a_timeout_out_of_range_is_a_400(worker: Worker, timeout: Any, word: str) -> None:
    item, status, _, _ = worker.call({"a": body(timeout=timeout)})["a"]
    error = json.loads(item)["error"]
    assert status == 400 and error["param"] == "timeout" and word in error["message"]


class Panic(BaseException):
    """As pyo3's for a panic of Rust: no Exception."""


def test_a_library_that_panics_while_one_request_is_read_refuses_it_alone(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Panic("hello")

    admit = worker.engine.admit
    worker.engine.admit = lambda request, origin=None: (  # type: ignore[method-assign]
        fail() if request.request_id == "bad" else admit(request)
    )
    replies = worker.call({"a": body(stream=True), "bad": body(), "b": body(stream=True)}, [TokenEvent("b", "x")])
    assert [reply[1] for reply in replies.values()] == [200, 500, 200]
    assert json.loads(replies["bad"][0])["error"]["type"] == "internal_error"
    assert replies["b"][0] == b'data: {"text":"x"}\n\n'
    assert worker.engine.evicted == ["bad"] and worker.batch.live == 2
    assert "bad: Panic at test_live_batch.py" in caplog.text and "hello" not in caplog.text


def test_a_request_that_fails_after_a_part_of_it_was_admitted_leaves_nothing(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(line: str, *args: Any) -> None:
        if "text(s)" in line:  # the last thing that is done
            raise Panic

    monkeypatch.setattr("dsserve.worker.live_batch.logger.info", fail)
    assert worker.call({"a": body()})["a"][1] == 500
    assert worker.engine.evicted == ["a"] and worker.batch.live == 0


def test_a_grammar_that_cannot_be_started_is_a_400(worker: Worker) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise GrammarError("of a user")

    worker.engine.admit = fail  # type: ignore[method-assign]
    item, status, _, _ = worker.call({"a": body()})["a"]
    assert status == 400 and "grammar" in json.loads(item)["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_panics_ends_alone(worker: Worker, stream: bool) -> None:
    def fail(event: TokenEvent) -> bytes:
        raise Panic

    worker.call({"a": body(stream=stream), "b": body(stream=True)})
    worker.batch._rows["a"].reply.take = fail  # type: ignore[method-assign]
    replies = worker.call({"a": {}, "b": {}}, [TokenEvent("a", "x"), TokenEvent("b", "y")])
    assert b"internal_error" in replies["a"][0] and replies["a"][3] == "false"
    assert replies["b"][0] == b'data: {"text":"y"}\n\n' and replies["b"][3] == "true"
    assert worker.engine.evicted == ["a"]


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_whose_message_cannot_be_written_is_answered_all_the_same(
    worker: Worker, stream: bool, is_new: bool
) -> None:
    rows, error = {"a": body(stream=stream), "b": body(stream=True)}, RequestError("a lone \ud83d", status=422)
    if not is_new:
        worker.call(rows)
        rows = {"a": {}, "b": {}}
    replies = worker.call(rows, [TokenEvent("a", "", failed=True, error=error), TokenEvent("b", "y")])
    assert replies["a"][1] == (422 if is_new else 200) and b'"error"' in replies["a"][0]
    assert replies["b"][0] == b'data: {"text":"y"}\n\n'
