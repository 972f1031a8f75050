"""The soak's faults, and what it measures of a server: memory, file handles, shared memory, sockets."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.serve import processes
from scripts.serve.run_dir import HOST, Record, RunDir

MIB = 2**20
CLIENTS_THAT_LEAVE = 100


def send_to(run: RunDir, role: str, number: signal.Signals) -> None:
    """Signals the server's processes of one role; none may be there (a restart)."""
    for process in processes.find_marked(run.path):
        if processes.describe(process) == role:
            with suppress(psutil.Error):
                process.send_signal(number)


def delete_sockets(record: Record) -> None:
    """Unlinks the workers' sockets: connections live on, names do not."""
    for path in Path(record.temp).glob(".ts.sock.*"):
        path.unlink(missing_ok=True)


def leave_early(record: Record) -> None:
    """Many clients that connect, send half a request or nonsense, and go."""
    for index in range(CLIENTS_THAT_LEAVE):
        with suppress(OSError), socket.create_connection((HOST, record.port), timeout=5) as client:
            if index % 3 == 1:
                client.sendall(b"POST /predictions/soak HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
            if index % 3 == 2:
                client.sendall(b"\x00nonsense\r\n\r\n")


def faults(run: RunDir, record: Record) -> list[tuple[str, Callable[[], None]]]:
    """All faults, in the order in which they are injected, again and again."""
    return [
        ("kill -9 rank 1", lambda: send_to(run, "rank 1", signal.SIGKILL)),
        ("stop rank 1", lambda: send_to(run, "rank 1", signal.SIGSTOP)),
        ("100 clients leave", lambda: leave_early(record)),
        ("kill -9 rank 0", lambda: send_to(run, "rank 0", signal.SIGKILL)),
        ("delete sockets", lambda: delete_sockets(record)),
        ("stop rank 0", lambda: send_to(run, "rank 0", signal.SIGSTOP)),
        ("kill -9 torchrun", lambda: send_to(run, "torchrun", signal.SIGKILL)),
    ]


@dataclass(frozen=True)
class Sample:
    """What the server holds at one moment.

    Attributes:
        memory_mib: role -> resident memory.
        files: role -> open file descriptors.
        shared_memory: DeepSpeed's segments in /dev/shm.
        sockets: names of sockets in the server's temporary folder.
        torchrun_folders: folders that torchruns left in the logs.
    """

    memory_mib: dict[str, float]
    files: dict[str, int]
    shared_memory: int
    sockets: int
    torchrun_folders: int


def take_sample(run: RunDir, record: Record) -> Sample:
    memory, files = {}, {}
    for process in processes.find_marked(run.path):
        with suppress(psutil.Error):
            role = processes.describe(process)
            memory[role] = round(process.memory_info().rss / MIB, 1)
            files[role] = process.num_fds()
    return Sample(
        dict(sorted(memory.items())),
        dict(sorted(files.items())),
        sum("deepspeed" in name for name in os.listdir("/dev/shm")),
        len(list(Path(record.temp).glob(".ts.sock.*"))),
        len(list((run.logs / "torchelastic_ts").glob("*"))),
    )
