"""Rank 0's engine behind its thread: a stall or an exception becomes an error for every live request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsserve.core.request import GenerationRequest, TokenEvent
from dsserve.engine.guarded_engine import EngineThread, LeaderEngine


class ScriptedEngine:
    """Does on each run what the test says."""

    def __init__(self) -> None:
        self.behave: Callable[[], list[TokenEvent]] = list
        self.evicted: list[str] = []

    def admit(self, request: GenerationRequest, origin: Any = None) -> None:
        pass

    def evict(self, request_id: str) -> None:
        self.evicted.append(request_id)

    def run(self, max_steps: int, limit_s: float) -> list[TokenEvent]:
        return self.behave()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def failures() -> list[str]:
    return []


@pytest.fixture
def leader(engine: ScriptedEngine, failures: list[str]) -> LeaderEngine:
    thread = EngineThread(torch.device("cpu"))
    return LeaderEngine(engine, thread, 0.3, lambda: failures.append("failed"))  # type: ignore[arg-type]


def admit(leader: LeaderEngine, *names: str) -> None:
    for name in names:
        leader.admit(GenerationRequest(name, (1,), 4))


def test_the_engine_runs_in_one_thread_of_its_own(engine: ScriptedEngine, leader: LeaderEngine) -> None:
    threads = set()
    event = TokenEvent("a", "x")

    def note() -> list[TokenEvent]:
        threads.add(threading.current_thread().name)
        return [event]

    engine.behave = note
    assert [leader.run(1) for _ in range(3)] == [[event]] * 3
    assert threads == {"dsserve-engine"}


def test_a_stall_is_an_error_for_those_who_still_wait(
    engine: ScriptedEngine, leader: LeaderEngine, failures: list[str]
) -> None:
    admit(leader, "done", "gone", "a", "b")
    engine.behave = lambda: [TokenEvent("done", "x", finish_reason="stop"), TokenEvent("a", "x")]
    leader.run(1)
    leader.evict("gone")
    engine.behave = lambda: time.sleep(5) or []
    started = time.monotonic()
    events = leader.run(1)
    assert 0.3 <= time.monotonic() - started < 2
    assert [(event.request_id, event.failed) for event in events] == [("a", True), ("b", True)]
    error = events[0].error
    assert error is not None and error.status == 503 and error.retry_after_s
    assert failures == ["failed"] and leader.has_failed


def test_an_exception_is_an_error_too_and_its_text_is_not_logged(
    engine: ScriptedEngine, leader: LeaderEngine, failures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    admit(leader, "a")

    def fail() -> list[TokenEvent]:
        raise ValueError("the text of a user")

    engine.behave = fail
    with caplog.at_level(logging.INFO):
        assert [event.request_id for event in leader.run(1)] == ["a"]
    assert failures == ["failed"]
    assert "ValueError at" in caplog.text and "test_guarded_engine.py" in caplog.text
    assert "the text of a user" not in caplog.text


class Panic(BaseException):
    """As pyo3's for a panic of Rust: no Exception."""


@pytest.mark.parametrize("error", [Panic, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_fails_the_engine_too_and_its_thread_lives(
    error: type[BaseException],
    engine: ScriptedEngine,
    leader: LeaderEngine,
    failures: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    admit(leader, "a", "b")

    def fail() -> list[TokenEvent]:
        raise error("the text of a user")

    engine.behave = fail
    begun = time.monotonic()
    events = leader.run(1)
    assert time.monotonic() - begun < 0.3, "nobody waited for the time limit"
    assert [(event.request_id, event.error and event.error.status) for event in events] == [("a", 503), ("b", 503)]
    assert failures == ["failed"] and leader.has_failed
    assert f"{error.__name__} at test_guarded_engine.py" in caplog.text and "the text of a user" not in caplog.text
    assert leader._thread.call(lambda: threading.current_thread().name) == "dsserve-engine"


def test_a_caller_gets_what_the_function_raised(leader: LeaderEngine) -> None:
    def fail() -> None:
        raise Panic

    with pytest.raises(Panic):
        leader._thread.call(fail)
