"""The process in which a grammar of a stranger is compiled first: what kills it there kills nobody else.

A compiler that overflows its stack, runs for minutes or takes gigabytes cannot be stopped from within. So each new
grammar is rehearsed in a fork of a small process that holds the tokenizer's view and nothing else: no torch, no CUDA,
no sockets. The fork has limits of processor time, memory and stack; its end is a verdict.

Measured on a CPU of 2 cores, in seconds of a processor, with llguidance 1.9.1 (two sizes of vocabulary):

| tokens | start | memory | verdict on a new schema of usual size |
| --- | --- | --- | --- |
| 49,152 | 0.9 | 83 MB | 0.03 to 0.25 |
| 151,936 | 2.1 | 156 MB | 0.03 to 0.25 |

It starts with the first grammar, while rank 0 makes its own view. A verdict takes 2 s at most, and 4 s of the clock.
"""

from __future__ import annotations

import contextlib
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

from dsserve.parallel.parent_watch import LAUNCH_VARIABLE, die_with_parent
from dsserve.sampling.matcher import TOO_COMPLEX, GrammarError, Vocabulary
from dsserve.sampling.rehearsal import rehearse

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
        self._is_ready = False

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return None if self._process is None else self._process.pid

    def judge(self, grammar: str) -> Verdict:
        """Rehearses a grammar.

        Raises:
            GrammarBusyError: no verdict in time.
        """
        self.start()
        try:
            found = self._ask(grammar.encode())
        except OSError:  # it did not answer in time, or was killed from outside
            self.close()
            raise GrammarBusyError from None
        verdict = Verdict(**json.loads(found))
        if verdict.is_late:
            raise GrammarBusyError
        return verdict

    def start(self) -> None:
        """Starts the process where none runs, and does not wait until it is ready.

        Raises:
            GrammarBusyError: there is no memory, or no room for a process.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        try:
            self._launch()
        except OSError:
            self.close()
            raise GrammarBusyError from None

    def close(self) -> None:
        """Ends the process."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._channel, self._is_ready = None, None, False

    def _launch(self) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            # As torchrun's child it would look for torchrun as its parent. A path may have come to sys.path since.
            kept = {name: value for name, value in os.environ.items() if name != LAUNCH_VARIABLE}
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        self._channel.settimeout(START_S)
        send(self._channel, json.dumps(asdict(self._vocabulary)).encode())

    def _ask(self, grammar: bytes) -> bytes:
        assert self._channel is not None, "a process that was started has a channel"
        if not self._is_ready:
            receive(self._channel, time.monotonic() + START_S)
            self._is_ready = True
        self._channel.settimeout(VERDICT_S)
        send(self._channel, grammar)
        return receive(self._channel, time.monotonic() + VERDICT_S)


def send(channel: socket.socket, text: bytes) -> None:
    """One message."""
    channel.sendall(len(text).to_bytes(_LENGTH_BYTES, "big") + text)


def receive(channel: socket.socket, deadline: float | None = None) -> bytes:
    """The next message.

    Args:
        deadline: of the monotonic clock.

    Raises:
        TimeoutError: it did not come in time.
        ConnectionError: the other end is gone.
    """
    return _read(channel, int.from_bytes(_read(channel, _LENGTH_BYTES, deadline), "big"), deadline)


def _read(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = channel.recv(size - len(parts))
        if not part:
            raise ConnectionError
        parts += part
    return bytes(parts)


def main() -> None:
    """The process: a vocabulary first, then one grammar after the other, until the other end closes."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold a schema
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    channel = socket.socket(fileno=os.dup(0))
    with contextlib.suppress(ConnectionError):
        tokens = Vocabulary(**json.loads(receive(channel))).tokens()
        send(channel, b"")
        while True:
            verdict = _rehearse_in_fork(tokens, receive(channel).decode())
            send(channel, json.dumps(asdict(verdict)).encode())


def _rehearse_in_fork(tokens: object, grammar: str) -> Verdict:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        limit_this_process()
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


def limit_this_process() -> None:
    """Ends this process where it takes more than a rehearsal may, of anything but the clock."""
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
