"""One reason for a load that fails, on all ranks: whoever fails first tells the others, and each raises the same error.

The ranks talk through torchrun's key-value store, past all collectives: a rank may fail where the others wait for it. A
rank that cannot raise, because it waits in a library, is ended by its watcher with the same line in the log. Does not
write the reasons (`load_failure`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from dsserve.core.errors import LoadError
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.load_failure import explain
from dsserve.parallel.rank import RankInfo
from dsserve.worker.watchdog import end_process

logger = logging.getLogger(__name__)

POLL_S = 0.02
WATCH_S = 0.25
# After another rank's failure: how long this rank may take to notice it by itself.
GRACE_S = 5.0
# After its own failure: how long a rank waits for the others before it wakes those that wait in gloo.
WAKE_S = 1.0
_CONNECT_S = 60.0
_HEARD = "heard"  # the place of a rank that has said the reason
_loads = itertools.count()


class LoadGuard:
    """The load of one rank. `with guard.load():` around all of it.

    Attributes:
        what: the architecture, or what stands for it as long as it is unknown; begins every unforeseen reason.
        clock: knows the stage; None as long as there is no device.
    """

    def __init__(self, what: str = "the model") -> None:
        self.what = what
        self.clock: LoadClock | None = None
        self._board: RankBoard | None = None
        self._over = threading.Event()
        self._rank = RankInfo(0, 0, 1, 1)

    @contextmanager
    def load(self) -> Iterator[LoadGuard]:
        """Whatever ends the block ends it on all ranks, as the same `LoadError`, which is in the log then.

        Raises:
            LoadError: this rank's reason or the one of the rank that failed before it.
        """
        try:
            self._rank = RankInfo.from_env()
            self._board = RankBoard.open(self._rank)
            self._start_watcher()
            yield self
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a library's panic (PyO3) is no Exception
            agreed = self._fail(error)
            if agreed is error:
                raise
            raise agreed from error
        finally:
            self._over.set()

    def meet(self, place: str) -> None:
        """Returns when all ranks have got to a place, which each passes once.

        Raises:
            LoadError: another rank failed.
        """
        if self._board is None:
            return
        self._board.arrive(place)
        while not self._board.wait_for_all(place, POLL_S):
            reason = self._board.reason()
            if reason is not None:
                raise LoadError(reason)

    def _fail(self, error: BaseException) -> LoadError:
        self._over.set()
        stage = self.clock.current if self.clock else "settings"
        found = explain(error, self.what, stage, self._rank.world_size)
        if found is not error:
            logger.debug("[dsserve] rank %d: the load ends", self._rank.rank, exc_info=error)
        board = self._board
        if board is None:
            logger.error("[dsserve] LoadError: %s", found)
            return found
        with contextlib.suppress(RuntimeError):  # the store has gone with torchrun: this rank's own reason stays
            reason = board.post(str(found))
            found = found if reason == str(found) else LoadError(reason)
        logger.error("[dsserve] LoadError: %s", found)
        with contextlib.suppress(RuntimeError):
            self._leave(board)
        return found

    def _leave(self, board: RankBoard) -> None:
        """Torchrun kills all ranks when the first one ends: first each says the reason."""
        board.arrive(_HEARD)
        if not board.wait_for_all(_HEARD, WAKE_S):
            _close_connections()
            board.wait_for_all(_HEARD, GRACE_S + WAKE_S)

    def _start_watcher(self) -> None:
        if self._board is not None:
            board = self._board.clone()
            threading.Thread(target=self._watch, args=(board,), name="dsserve-load-guard", daemon=True).start()

    def _watch(self, board: RankBoard) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._over.wait(WATCH_S):
                reason = board.reason()
                if reason is not None and not self._over.wait(GRACE_S):
                    logger.error("[dsserve] LoadError: %s", reason)
                    board.arrive(_HEARD)
                    end_process()


class RankBoard:
    """What the ranks of one load write for each other: the first reason of a failure, and where they have got to."""

    def __init__(self, store: Any, ranks: int, prefix: str) -> None:
        self._store = store
        self._ranks = ranks
        self._prefix = prefix

    @classmethod
    def open(cls, rank: RankInfo) -> RankBoard | None:
        """The board of this process's next load; None for one rank alone. Each rank opens as many, in one order."""
        if rank.world_size == 1:
            return None
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_CONNECT_S)))
        return cls(store, rank.world_size, f"dsserve/load/{next(_loads)}")

    def clone(self) -> RankBoard:
        """The same board over a connection of its own, for another thread."""
        return RankBoard(self._store.clone(), self._ranks, self._prefix)

    def post(self, reason: str) -> str:
        """Writes a reason if there is none yet; returns the one that stands there."""
        return bytes(self._store.compare_set(self._key("reason"), "", reason)).decode()

    def reason(self) -> str | None:
        """The first reason, None as long as nobody failed."""
        key = self._key("reason")
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else None

    def arrive(self, place: str) -> None:
        """Counts this rank at a place."""
        self._store.add(self._key(place), 1)

    def arrived(self, place: str) -> int:
        """How often ranks were counted there."""
        return int(self._store.add(self._key(place), 0))

    def wait_for_all(self, place: str, seconds: float) -> bool:
        """Whether each rank is counted there before the time is over."""
        until = time.monotonic() + seconds
        while self.arrived(place) < self._ranks:
            if time.monotonic() > until:
                return False
            time.sleep(POLL_S / 4)
        return True

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _close_connections() -> None:
    """Ranks that wait for this one in gloo get an error at once, unless DeepSpeed holds the group: those are ended by
    their watchers. NCCL's groups may not be destroyed (`finish_rank`)."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
