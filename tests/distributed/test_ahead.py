"""Two real ranks: steps whose tokens come from rank 0's device change no text, and void ones are void on all ranks."""

from __future__ import annotations

from pathlib import Path

from tests.support.ranks import run_ranks
from tests.support.schedules import make_llama


def test_texts_are_those_of_steps_that_wait(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    leader, other = run_ranks(
        "tests.programs.distributed.ahead:texts", path=str(tmp_path), seeds=list(range(4)), share=0.05
    )
    assert leader["differences"] == []
    steps, ahead, void = leader["counts"]
    assert other["counts"] == leader["counts"]
    assert ahead > 0.3 * steps and 0 < void < ahead
