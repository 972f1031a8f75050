"""The clock of a load: phases, lines while a long one is under way, memory of the process alone."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

from dsserve.loading.load_clock import LoadClock, own_bytes

CPU = torch.device("cpu")


def test_phases_add_up_and_long_ones_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    clock = LoadClock(1, CPU, report_every_s=0.05)
    clock.share_bytes = 3 * 2**30
    with caplog.at_level("INFO"):
        with clock.phase("shard"):
            taken = torch.ones(2**26)  # 0.25 GiB
            time.sleep(0.2)
        with clock.phase("shard"), clock.phase("pack"):
            pass
    assert taken.sum() == 2**26
    assert clock.seconds["shard"] >= 0.2 > clock.seconds["pack"]
    assert "rank 1: shard: 0 s, holds 0." in caplog.text and "of about 3.0 GiB" in caplog.text
    assert clock.summary().startswith("0.") and "shard 0." in clock.summary() and "other 0.0" in clock.summary()


def test_pages_of_files_are_no_memory_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(2**26))
    before = own_bytes(CPU)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert own_bytes(CPU) - before < 2**25
        with mmap.mmap(-1, 2**26) as own:  # never memory that an earlier test has freed
            own.write(b"1" * 2**26)
            assert own_bytes(CPU) - before > 2**25
