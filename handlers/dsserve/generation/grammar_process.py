"""The process in which a grammar of a stranger is compiled first: what kills it there kills nobody else.

A compiler that overflows its stack, runs for minutes or takes gigabytes cannot be stopped from within. So each new
grammar is rehearsed in a fork of a small process that holds the tokenizer's view and nothing else: no torch, no CUDA,
no sockets. The fork has limits of processor time, memory and stack; its end is a verdict.

Measured with 49,152 tokens: 1.0 s until the first verdict (0.1 s Python, 0.9 s the view, which rank 0 makes, too),
90 MB, then 6 ms more than the rehearsal itself for each new grammar. A verdict of 2 s of a processor is the worst.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from dsserve.generation.matcher import TOO_COMPLEX, GrammarError, Vocabulary
from dsserve.generation.rehearsal import rehearse
from dsserve.parents import LAUNCH_VARIABLE, die_with_parent

PROCESSOR_S = 2.0  # of a rehearsal
CLOCK_S = 4.0  # of a rehearsal; on a busy machine the clock runs faster than the processor
MEMORY_BYTES = 512 * 2**20  # of a rehearsal, beside what the process has
# Half of what a thread has by default: what passes here passes there.
STACK_BYTES = 4 * 2**20
VERDICT_S = 5.0  # until the process itself is given up
START_S = 20.0
_LENGTH_BYTES = 4
_MOST_ANSWER_BYTES = 65_536  # what a pipe takes and gives at once
_MOST_FAULT = 200


class GrammarBusyError(Exception):
    """No verdict in time, or no process: the grammar may be good, and the same request may succeed later."""


@dataclass(frozen=True)
class Verdict:
    """Of one grammar.

    Attributes:
        fault: why it cannot be used; None where it can.
        nbytes: what the rehearsal took, at least what its matcher takes.
        is_late: it was not finished, and the machine may be at fault.
    """

    fault: str | None
    nbytes: int = 0
    is_late: bool = False


class GrammarProcess:
    """Rank 0's end: started by the first grammar, kept, and started again after it was ended. Not for several threads.

    It ends with this process: its channel closes, and the kernel kills it where the thread that started it ends.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return None if self._process is None else self._process.pid

    def judge(self, grammar: str) -> Verdict:
        """Rehearses a grammar.

        Raises:
            GrammarBusyError: no verdict in time.
        """
        try:
            channel = self._started()
            channel.settimeout(VERDICT_S)
            send(channel, grammar.encode())
            found = receive(channel, time.monotonic() + VERDICT_S)
        except OSError:
            self.close()
            raise GrammarBusyError from None
        if found is None:  # killed from outside
            self.close()
            raise GrammarBusyError
        verdict = Verdict(**json.loads(found))
        if verdict.is_late:
            raise GrammarBusyError
        return verdict

    def close(self) -> None:
        """Ends the process."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None

    def _started(self) -> socket.socket:
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            # As torchrun's child it would look for torchrun as its parent. A path may have come to sys.path since.
            kept = {name: value for name, value in os.environ.items() if name != LAUNCH_VARIABLE}
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        self._channel = ours
        ours.settimeout(START_S)
        send(ours, json.dumps(asdict(self._vocabulary)).encode())
        if receive(ours, time.monotonic() + START_S) is None:
            raise OSError
        return ours


def send(channel: socket.socket, text: bytes) -> None:
    """One message."""
    channel.sendall(len(text).to_bytes(_LENGTH_BYTES, "big") + text)


def receive(channel: socket.socket, deadline: float | None = None) -> bytes | None:
    """The next message; None where the other end is gone.

    Args:
        deadline: of the monotonic clock.

    Raises:
        TimeoutError: it did not come in time.
    """
    head = _read(channel, _LENGTH_BYTES, deadline)
    return None if head is None else _read(channel, int.from_bytes(head, "big"), deadline)


def _read(channel: socket.socket, size: int, deadline: float | None) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = channel.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main() -> None:
    """The process: a vocabulary first, then one grammar after the other, until the other end closes."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold a schema
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    channel = socket.socket(fileno=os.dup(0))
    text = receive(channel)
    if text is None:
        return
    tokens = Vocabulary(**json.loads(text)).tokens()
    send(channel, b"")
    while (grammar := receive(channel)) is not None:
        verdict = _rehearse_in_fork(tokens, grammar.decode())
        send(channel, json.dumps(asdict(verdict)).encode())


def _rehearse_in_fork(tokens: object, grammar: str) -> Verdict:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        _limit()
        os.write(theirs, json.dumps(asdict(_rehearse(tokens, grammar))).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as answer:
        # What is written, or that nobody can write any more, comes first.
        is_late = not select.select([answer], [], [], CLOCK_S)[0]
        if is_late:
            os.kill(pid, signal.SIGKILL)
        said = b"" if is_late else answer.read(_MOST_ANSWER_BYTES)
    _, status, used = os.wait4(pid, 0)
    if said and not status:
        return Verdict(**json.loads(said))
    return Verdict(TOO_COMPLEX, is_late=is_late and used.ru_utime + used.ru_stime < PROCESSOR_S / 2)


def _limit() -> None:
    most = _memory(0) + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_S)  # SIGPROF ends a process that has no handler for it


def _rehearse(tokens: object, grammar: str) -> Verdict:
    before = _memory(1)
    try:
        matcher = rehearse(tokens, grammar)
    except GrammarError as error:
        return Verdict(str(error)[:_MOST_FAULT])
    except MemoryError:
        return Verdict(TOO_COMPLEX)
    verdict = Verdict(None, max(0, _memory(1) - before))
    del matcher  # its end may overflow the stack, too
    return verdict


def _memory(kind: int) -> int:
    """Bytes of this process: 0 = of its addresses, 1 = resident."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[kind]) * resource.getpagesize()


if __name__ == "__main__":
    main()
