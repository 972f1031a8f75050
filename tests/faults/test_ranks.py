"""Ranks and their torchrun killed, stopped, slowed down or broken while they stream.

What must hold: every client hears of it, at once or within the time limit; the worker serves the right text again by
itself; nothing of the old worker lives on or lies in /dev/shm.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from scripts.serve import processes
from tests.faults.conftest import COLLECTIVE_TIMEOUT_S, LONG, PROMPT, Victim, wait_until

STARTS_WITHIN_S = 120
CUT_WITHIN_S = 5
# The other ranks give up so much later than rank 0 (`dsserve.config.torchserve.ANSWER_MARGIN_S`); 3 s are for a busy
# machine.
MARGIN_S = 5 + 3


def old_worker(victim: Victim) -> list[psutil.Process]:
    return [item for item in processes.find_marked(victim.run.path) if processes.describe(item) != "TorchServe"]


def assert_recovers(victim: Victim, old: list[psutil.Process]) -> float:
    seconds = victim.wait_until_served(STARTS_WITHIN_S)
    victim.assert_whole()
    assert not [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    return seconds


@pytest.mark.parametrize(
    "role",
    [
        "rank 1",
        pytest.param("rank 0", marks=pytest.mark.long),
        pytest.param("torchrun", marks=pytest.mark.long),
    ],
)
def test_a_process_that_is_killed(victim: Victim, measured: Callable[..., None], role: str) -> None:
    """TorchServe cuts the streams at once (no process of ours can answer), and starts the worker anew."""
    streams, old = [victim.stream(LONG).wait_for_tokens() for _ in range(3)], old_worker(victim)
    killed_at = time.monotonic()
    victim.process(role).kill()
    for stream in streams:
        stream.join()
        assert "[DONE]" not in stream.events
    heard_s = max(stream.ended_at or 0 for stream in streams) - killed_at
    assert heard_s < CUT_WITHIN_S
    measured(clients_hear_after=heard_s, served_again_after=heard_s + assert_recovers(victim, old))


def test_a_rank_that_stalls_in_a_step(victim: Victim, measured: Callable[..., None]) -> None:
    """Rank 0 waits in an all-reduce without a time-out; each stream still ends with an error event."""
    streams, old = [victim.stream(LONG).wait_for_tokens() for _ in range(3)], old_worker(victim)
    stopped_at = time.monotonic()
    victim.process("rank 1").send_signal(signal.SIGSTOP)
    for stream in streams:
        stream.join()
        assert stream.error is None and stream.events[-1] == "[DONE]"
        assert json.loads(stream.events[-2])["error"]["type"] == "server_error"
    heard_s = max(stream.ended_at or 0 for stream in streams) - stopped_at
    assert heard_s < COLLECTIVE_TIMEOUT_S + 3
    measured(clients_hear_after=heard_s, served_again_after=heard_s + assert_recovers(victim, old))


@pytest.mark.long
def test_a_rank_that_stalls_while_idle(victim: Victim, measured: Callable[..., None]) -> None:
    """The next request finds it: it has not been answered at all yet, so it gets the status 503."""
    old = old_worker(victim)
    victim.process("rank 1").send_signal(signal.SIGSTOP)
    response = victim.ask(PROMPT)
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["error"]["type"] == "server_error"
    measured(served_again_after=assert_recovers(victim, old))


@pytest.mark.long
def test_rank_0_stalls(victim: Victim, measured: Callable[..., None]) -> None:
    """Nobody can answer for rank 0: the other rank's watchdog ends the worker, and TorchServe cuts the streams."""
    stream, old = victim.stream(LONG).wait_for_tokens(), old_worker(victim)
    stopped_at = time.monotonic()
    victim.process("rank 0").send_signal(signal.SIGSTOP)
    heard_s = (stream.join().ended_at or 0) - stopped_at
    assert "[DONE]" not in stream.events
    assert heard_s < COLLECTIVE_TIMEOUT_S + MARGIN_S
    assert "a call of the handler takes longer" in victim.worker_log()
    measured(clients_hear_after=heard_s, served_again_after=heard_s + assert_recovers(victim, old))


@pytest.mark.long
def test_torchrun_stalls(victim: Victim) -> None:
    """It only watches: the ranks go on, and requests are served."""
    torchrun = victim.process("torchrun")
    torchrun.send_signal(signal.SIGSTOP)
    try:
        assert victim.text(PROMPT) == victim.expected()
    finally:
        torchrun.send_signal(signal.SIGCONT)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises(victim: Victim, measured: Callable[..., None], rank: int) -> None:
    """Rank 0 still answers with an error event; the death of another rank makes TorchServe cut the streams."""
    stream, old = victim.stream(LONG).wait_for_tokens(), old_worker(victim)
    with victim.fault(rank, "raise"):
        stream.join()
    if rank == 0:
        assert stream.error is None and json.loads(stream.events[-2])["error"]["type"] == "server_error"
    else:
        assert "[DONE]" not in stream.events
    assert "RuntimeError at" in victim.worker_log()
    measured(served_again_after=assert_recovers(victim, old))


@pytest.mark.long
def test_a_slow_rank_is_waited_for(victim: Victim) -> None:
    """Slower than usual, and within the limit: nobody is ended, and the text is right."""
    old = old_worker(victim)
    with victim.fault(1, "sleep 0.5"):
        assert victim.text(PROMPT) == victim.expected()
    assert {process.pid for process in old_worker(victim)} == {process.pid for process in old}


@pytest.mark.long
def test_requests_that_wait_for_a_stalled_worker_end_cleanly(victim: Victim, measured: Callable[..., None]) -> None:
    """16 run and 32 wait. Those that wait within the handler have their status 200 and get the error as their body;
    what TorchServe still held gets its 503, or is served by the next worker. Nobody hangs, and no text is wrong."""
    old = old_worker(victim)
    running = [victim.stream(LONG) for _ in range(16)]
    for stream in running:
        stream.wait_for_tokens()
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(victim.ask, PROMPT, STARTS_WITHIN_S) for _ in range(32)]
        time.sleep(1)
        victim.process("rank 1").send_signal(signal.SIGSTOP)
        for stream in running:
            assert json.loads(stream.join().events[-2])["error"]["type"] == "server_error"
        replies = [reply.result() for reply in waiting]
    begun = [reply.json() for reply in replies if reply.status_code == 200]
    texts = [body["text"] for body in begun if "text" in body]
    errors = [body["error"]["type"] for body in begun if "error" in body]
    measured(of_32_waiting_served=len(texts), got_an_error_body=len(errors), got_503=32 - len(begun))
    assert len(texts) + len(errors) == len(begun)
    assert all(text == victim.expected() for text in texts) and set(errors) <= {"server_error"}
    assert {reply.status_code for reply in replies} <= {200, 500, 503}
    assert_recovers(victim, old)


@pytest.mark.long
def test_no_worker_dies_of_nothing(victim: Victim) -> None:
    """An idle worker outlives its time limits: they are of calls."""
    victim.wait_until_served(STARTS_WITHIN_S)
    old = {process.pid for process in old_worker(victim)}
    time.sleep(COLLECTIVE_TIMEOUT_S + MARGIN_S)
    assert {process.pid for process in old_worker(victim)} == old
    wait_until(lambda: victim.text(PROMPT) == victim.expected(), 30)


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_for_which_a_rank_has_no_memory_fails_alone(victim: Victim, stream: bool) -> None:
    neighbour = victim.stream(LONG).wait_for_tokens()
    with victim.fault(1, "memory 40"):
        refused = victim.ask({"prompt": "one two three four " * 20, "stream": stream, "max_new_tokens": 4})
        assert refused.status_code == 507
        assert refused.json()["error"]["code"] == "out_of_memory"
        assert victim.text(PROMPT) == victim.expected()
    count = len(neighbour.events)
    wait_until(lambda: len(neighbour.events) > count + 4, 20)
    assert neighbour.ended_at is None and "error" not in "".join(neighbour.events)


@pytest.mark.long
def test_memory_that_fails_again_and_again_ends_the_worker(victim: Victim, measured: Callable[..., None]) -> None:
    """Two short prompts fail alone; at the third something holds memory that should be free: a new worker helps."""
    victim.wait_until_served(STARTS_WITHIN_S)
    old = old_worker(victim)
    prompt = {"prompt": "five six seven eight " * 20, "max_new_tokens": 4}
    with victim.fault(1, "memory 40"):
        replies = [victim.ask(prompt) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [507, 507, 503]
    assert replies[2].json()["error"]["type"] == "server_error" and replies[2].headers["retry-after"]
    measured(served_again_after=assert_recovers(victim, old))


def test_requests_that_take_too_long_end_with_an_error_and_free_their_slots(victim: Victim) -> None:
    started = time.monotonic()
    stream = victim.stream({**LONG, "timeout": 2}).join(30)
    assert json.loads(stream.events[-2])["error"]["code"] == "timeout" and stream.events[-1] == "[DONE]"
    late = victim.ask({**LONG, "timeout": 1.5})
    assert late.status_code == 200 and late.json()["error"]["type"] == "timeout_error"
    first_call = victim.ask({**LONG, "timeout": 1e-6})
    assert first_call.status_code == 504 and first_call.json()["error"]["param"] == "timeout"
    assert time.monotonic() - started < 30
    assert victim.text(PROMPT) == victim.expected()
