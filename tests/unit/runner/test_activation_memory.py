"""What a prefill pass is taken to need: its activations, not what stays, comes or goes beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsserve.parallel.rank import RankInfo
from dsserve.runner.activation_memory import PrefillMemory

GIB = 2**30


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU's, which refuses more than 8 GiB at once."""
    bytes_ = {"now": 20 * GIB, "peak": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: bytes_["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: bytes_["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: bytes_.update(peak=bytes_["now"]))

    def empty(size: int, **_: object) -> None:
        if size > 8 * GIB:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", empty)
    return bytes_


@pytest.fixture
def memory() -> PrefillMemory:
    return PrefillMemory(torch.device("cuda"), RankInfo(0, 0, 1, 1), vocabulary=100)


def pass_of(bytes_: dict[str, int], activations: int, stays: int = 0, goes: int = 0) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        bytes_["now"] += stays - goes
        bytes_["peak"] = max(bytes_["peak"], bytes_["now"] + activations)
        return torch.zeros(1)

    return run


@pytest.mark.parametrize("beside", [{}, {"stays": 4 * GIB}, {"goes": 4 * GIB}, {"stays": 1 * GIB, "goes": 4 * GIB}])
def test_a_cache_that_comes_and_garbage_that_goes_are_no_activations(
    allocator: dict[str, int], memory: PrefillMemory, beside: dict[str, int]
) -> None:
    assert memory.run(pass_of(allocator, 16 * 2**20, **beside), 16, 1) is not None
    assert memory.run(pass_of(allocator, 16 * 2**20), 16, 1) is not None
    assert memory.has_room(4096, 1) and not memory.has_room(8193, 1), "1 MiB a token, and 8 GiB"


def test_a_pass_is_judged_by_longer_ones_and_by_its_like(allocator: dict[str, int], memory: PrefillMemory) -> None:
    """1 MiB is taken whatever the tokens, as by weights that are expanded, and 1 KiB a token."""
    for tokens in (64, 2048):
        memory.run(pass_of(allocator, 2**20 + tokens * 2**10), tokens, 1)
    assert memory.needed(4096) == 2 * (2**20 + 2**21), "more in proportion to the longest"
    assert memory.needed(64) == 2**20 + 2**16
    assert memory.needed(16) == (2**20 + 2**16) // 4
    assert memory.needed(1024) == memory.needed(2048) == 2**20 + 2**21, "never more than a longer one took"


def test_what_reads_the_cache_or_wants_all_logits_teaches_nothing(
    allocator: dict[str, int], memory: PrefillMemory
) -> None:
    memory.run(pass_of(allocator, 2**20), 1024, 1)
    memory.run(pass_of(allocator, 2**10), 4096, 1, is_plain=False)
    memory.run(pass_of(allocator, 2**30), 1024, 1024, is_plain=False)
    assert memory.needed(4096) == 2**22
