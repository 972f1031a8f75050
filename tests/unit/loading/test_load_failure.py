"""What no check has foreseen ends a load as one line that names the architecture, the stage, the type and the place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsserve.core.errors import LoadError
from dsserve.loading.load_failure import explain
from dsserve.sampling.inverse_cdf import weigh
from dsserve.worker.load_guard import LoadGuard


def raised(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_load_error_stays_itself() -> None:
    error = LoadError("config.json: no such key")
    assert explain(error, "X", "files") is error


def test_a_bug_of_ours_can_be_recognised_by_type_and_place() -> None:
    text = str(explain(raised(lambda: weigh(None, None)), "LlamaForCausalLM", "warm-up"))  # type: ignore[arg-type]
    for word in ("LlamaForCausalLM", "warm-up", "TypeError", "inverse_cdf.py:"):
        assert word in text
    assert "\n" not in text


def test_a_librarys_place_is_followed_by_ours() -> None:
    def fail() -> None:
        raise ValueError("first line\nsecond line")

    text = str(explain(raised(fail), "X", "warm-up", ranks=2))
    assert "ValueError" in text and "test_load_failure.py:" in text and "first line" in text
    assert "second line" not in text and "2 ranks" in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["no memory", "nproc-per-node"]),
        (MemoryError(), ["no memory"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"), ["no memory"]),
        (RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:1"), ["another rank ended", "killed"]),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
            ["device failed", "CUDA"],
        ),
        (AttributeError("'PackedLinear' object has no attribute 'weight'"), ["handler.pack_weights: false"]),
    ],
)
def test_kinds_that_have_a_mend_of_their_own(error: BaseException, words: list[str]) -> None:
    text = str(explain(error, "XForCausalLM", "shard"))
    assert all(word in text for word in [*words, "XForCausalLM", "shard"])
    assert "Connection closed by peer" not in text


@pytest.mark.parametrize(
    ("error", "stage", "words"),
    [
        (OSError(98, "Address already in use"), "after warm-up", "a port"),
        (AttributeError("no such key"), "settings", "report this line"),
        (AttributeError("no such key"), "warm-up", "this architecture is not served"),
    ],
)
def test_the_mend_fits_the_stage(error: BaseException, stage: str, words: str) -> None:
    assert words in str(explain(error, "X", stage))


class Panic(BaseException):
    """As PyO3 raises them: no Exception."""


def test_a_librarys_panic_ends_a_load_as_a_load_error(caplog: pytest.LogCaptureFixture) -> None:
    guard = LoadGuard("XForCausalLM")
    with pytest.raises(LoadError, match=r"XForCausalLM.*Panic.*index out of bounds"), guard.load():
        raise Panic("index out of bounds")
    (line,) = [record.getMessage() for record in caplog.records if "LoadError" in record.getMessage()]
    assert "\n" not in line


def test_an_interrupt_is_none() -> None:
    with pytest.raises(KeyboardInterrupt), LoadGuard().load():
        raise KeyboardInterrupt
