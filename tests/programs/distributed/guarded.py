"""What the ranks do for `test_load_guard`: loads that fail on one of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from dsserve.core.errors import LoadError
from dsserve.parallel.rank import RankInfo
from dsserve.worker.load_guard import LoadGuard

WORDS = "layer 3 has no weight"


def reasons() -> dict[str, str]:
    """Kind of failure -> this rank's reason, and the seconds that all of them took. Rank 1 fails."""
    started = time.monotonic()
    found = {
        "none": _reason(lambda rank: None),
        "before the group": _reason(_fail_on_one),
        "each another": _reason(_fail_on_all),
        "at the end": _reason(lambda rank: _fail_on_one(rank, 0.5)),
        "in a sum": _reason(_fail_beside_a_sum),
    }
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {**found, "seconds": str(time.monotonic() - started)}


def stuck() -> str:
    """Rank 1 fails while rank 0 is where no exception reaches it."""

    def load(rank: int) -> None:
        _fail_on_one(rank)
        time.sleep(600)

    return _reason(load)


def _reason(load: Callable[[int], None]) -> str:
    guard = LoadGuard("XForCausalLM")
    try:
        with guard.load():
            load(RankInfo.from_env().rank)
            guard.meet("the end")
    except LoadError as error:
        return str(error)
    return ""


def _fail_on_one(rank: int, after_s: float = 0.0) -> None:
    if rank == 1:
        time.sleep(after_s)
        raise IndexError(WORDS)


def _fail_on_all(rank: int) -> None:
    raise LoadError(f"reason of rank {rank}")


def _fail_beside_a_sum(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    _fail_on_one(rank)
    torch.distributed.all_reduce(torch.ones(1))
