"""The process that compiles grammars first: whatever a schema does to it, rank 0 lives and gets a verdict in time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsserve.protocol.openai.structured import _schema_grammar
from dsserve.protocol.schema_bounds import REACH
from dsserve.sampling.grammar_process import (
    CLOCK_S,
    MEMORY_BYTES,
    VERDICT_S,
    GrammarBusyError,
    GrammarProcess,
    Verdict,
    limit_this_process,
)
from dsserve.sampling.matcher import Vocabulary
from tests.support.schemas import ENDLESS, GOOD, TOO_COMPLEX, WIDTH, WRAPS, byte_tokenizer, chain, text
from tests.support.waiting import wait_for

FIRST_ENDLESS = next(iter(ENDLESS.values()))


@pytest.fixture(scope="module")
def process() -> Iterator[GrammarProcess]:
    made = GrammarProcess(Vocabulary.of(byte_tokenizer(), WIDTH, frozenset({256})))
    yield made
    made.close()


def judge(process: GrammarProcess, schema: Any) -> Verdict:
    started = time.monotonic()
    verdict = process.judge(_schema_grammar(schema))
    assert time.monotonic() - started < VERDICT_S + 1
    return verdict


@pytest.mark.parametrize("wrap", ["items", "properties", "anyOf", "patternProperties"])
def test_a_crash_is_a_verdict_and_ends_nothing(process: GrammarProcess, wrap: str) -> None:
    judge(process, {})
    pid = process.pid
    for length in (1400, 5000):
        fault = judge(process, chain(length, WRAPS[wrap])).fault
        assert fault is not None and "too complex" in fault
    assert judge(process, GOOD["person"]).fault is None and process.pid == pid


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name not in ("if", "not", "const", "oneOf")])
def test_what_the_bounds_let_through_does_not_crash(process: GrammarProcess, wrap: str) -> None:
    """With half the stack of a thread."""
    assert judge(process, chain(REACH.most // 2, WRAPS[wrap])).fault is None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if at else []) for at, name in enumerate(ENDLESS)]
)
def test_a_schema_that_compiles_for_minutes_is_given_up(process: GrammarProcess, name: str) -> None:
    with contextlib.suppress(GrammarBusyError):  # on a very busy machine
        fault = judge(process, ENDLESS[name]).fault
        assert fault is not None and "too complex" in fault
    assert judge(process, {"type": "null"}).fault is None


@pytest.mark.parametrize("schema", TOO_COMPLEX.values(), ids=TOO_COMPLEX)
def test_a_schema_whose_texts_would_fail_is_found_out(process: GrammarProcess, schema: Any) -> None:
    fault = judge(process, schema).fault
    assert fault is not None and ("too complex" in fault or "too large" in fault or "too big" in fault)


def test_a_rehearsal_has_no_more_memory_than_its_limit() -> None:
    pid = os.fork()
    if pid == 0:
        limit_this_process()
        try:
            bytearray(2 * MEMORY_BYTES)
        except MemoryError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def kill_while_it_compiles(process: GrammarProcess, kill: Callable[[int], None]) -> None:
    pid = process.pid
    assert pid is not None
    timer = threading.Timer(0.5, kill, [pid])
    timer.start()
    with pytest.raises(GrammarBusyError):
        process.judge(_schema_grammar(FIRST_ENDLESS))
    timer.join()


def test_a_process_that_is_killed_while_it_compiles_is_started_again(process: GrammarProcess) -> None:
    judge(process, {})
    before = process.pid
    kill_while_it_compiles(process, lambda pid: os.kill(pid, signal.SIGKILL))
    assert judge(process, {}).fault is None and process.pid != before


def test_a_process_that_was_killed_between_two_grammars_is_started_again(process: GrammarProcess) -> None:
    judge(process, {})
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert judge(process, {}).fault is None


def test_a_process_that_is_stopped_is_given_up_in_time(
    process: GrammarProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(process, {})
    monkeypatch.setattr("dsserve.sampling.grammar_process.VERDICT_S", 1.5)
    started = time.monotonic()
    kill_while_it_compiles(process, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert time.monotonic() - started < 2.5
    monkeypatch.undo()
    assert judge(process, {}).fault is None


def test_it_has_no_files_of_ours_and_says_nothing(process: GrammarProcess, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        os.set_inheritable(listening.fileno(), True)
        process.close()
        judge(process, chain(1400, WRAPS["items"]))
        judge(process, {"const": "a secret"})
        links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert len([link for link in links if link.startswith("socket:")]) <= 2  # its channel, twice
    assert all(link.startswith(("socket:", "/dev/null")) for link in links)
    assert capfd.readouterr() == ("", "")


_OWNER = """
import sys, threading
from dsserve.sampling.grammar_process import GrammarProcess
from dsserve.sampling.matcher import Vocabulary
from dsserve.protocol.openai.structured import _schema_grammar
from tests.support.schemas import ENDLESS, WIDTH, byte_tokenizer
process = GrammarProcess(Vocabulary.of(byte_tokenizer(), WIDTH, frozenset({256})))
process.judge(_schema_grammar({}))
print(process.pid, flush=True)
process.judge(_schema_grammar(next(iter(ENDLESS.values()))))
"""


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_dies_with_its_owner_also_while_it_compiles() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCHELASTIC_RUN_ID": "a"}
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        wait_for(lambda: len(children_of(pid)) == 1)
        both = [pid, *children_of(pid)]
        owner.kill()
    # Its fork would compile for 2 s of a processor, and it would wait for the fork.
    wait_for(lambda: not any(map(is_alive, both)), 1.5)


_KEYS = [
    *("type", "properties", "items", "required", "enum", "const", "anyOf", "allOf", "oneOf", "not", "if", "then"),
    *("$ref", "$defs", "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "multipleOf", "minItems"),
    *("maxItems", "additionalProperties", "patternProperties", "prefixItems", "title"),
]
_LEAVES = (
    st.sampled_from(
        ["string", "integer", "number", "object", "array", "null", "#", "#/$defs/a", "^a+$", "(a|b){3}", "x"]
    )
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
)
_ANY = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*_KEYS, "a", "b"]), inner, max_size=5),
    max_leaves=25,
)
_SCHEMAS = st.dictionaries(st.sampled_from(_KEYS), _ANY, max_size=6)


_SUPPORTED = sorted(WRAPS.keys() - {"not", "if", "oneOf"})


@st.composite
def hostile(draw: st.DrawFn) -> dict[str, Any]:
    """Sound schemas, wrapped, chained and combined at random."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    known = [*GOOD.values(), *TOO_COMPLEX.values()]
    parts: list[Any] = [*(part for part in known if "$ref" not in part), text(f".*{chance.random()}.*"), draw(_SCHEMAS)]
    for _ in range(draw(st.integers(1, 12))):
        wrap = WRAPS[chance.choice(_SUPPORTED)]
        parts.append(wrap(chance.choice(parts[-6:])))
        parts.append({chance.choice(["allOf", "anyOf"]): chance.sample(parts, 3)})
    return {**parts[-1], "title": "x"}


def _never_crashes(process: GrammarProcess, schema: dict[str, Any]) -> None:
    started = time.monotonic()
    try:
        verdict = process.judge(_schema_grammar(schema))
        assert verdict.fault is None or verdict.fault
    except GrammarBusyError:
        assert time.monotonic() - started > 0.8 * CLOCK_S
    assert time.monotonic() - started < VERDICT_S + 1


_QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=30, **_QUIET)
@given(schema=_SCHEMAS | hostile())
def test_any_schema_gets_a_verdict(process: GrammarProcess, schema: dict[str, Any]) -> None:
    _never_crashes(process, schema)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=2000, **_QUIET)
@given(schema=_SCHEMAS | hostile())
def test_any_of_many_schemas_gets_a_verdict(process: GrammarProcess, schema: dict[str, Any]) -> None:
    _never_crashes(process, schema)
