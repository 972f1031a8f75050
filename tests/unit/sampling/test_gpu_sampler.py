"""The device's sampler, on a CPU and without graphs, against the sampler itself: the same tokens, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsserve.core.request import SamplingParams
from dsserve.sampling.gpu_draw import ROW_NUMBERS, draw, row_numbers
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from dsserve.sampling.sampler import choose
from tests.support.sampling import KINDS, assert_same, make_logits, params, states_of

CPU = torch.device("cpu")
# Fewer than the candidates; fewer than are searched by blocks; more; and more, not in whole blocks.
WIDTHS = [3, 100, 128, 200, 20_000, 4 * 128 * 64, 33_001, 49_152]


def assert_device_samples_the_same(logits: torch.Tensor, rows: list[SamplingParams], steps: int = 2) -> None:
    """Both samplers; the logits stay as they are."""
    before = logits.clone()
    assert_same([HostChoice, DeviceSampler(len(rows), logits.shape[1], CPU).launch], logits, rows, steps)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(params, min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.sampled_from(WIDTHS),
    st.sampled_from([0.3, 3.0, 8.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(KINDS),
)
def test_the_tokens_are_the_samplers(
    rows: list[SamplingParams], seed: int, width: int, spread: float, dtype: torch.dtype, kind: str
) -> None:
    assert_device_samples_the_same(make_logits(seed, len(rows), width, spread, dtype, kind), rows)


@pytest.mark.parametrize("kind", ["plain", "ties"])
@pytest.mark.parametrize(
    "rules",
    [
        {}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 100, "typical_p": 0.9},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.95},
    ],
)  # fmt: skip
def test_many_draws_of_one_kind(rules: dict[str, float], kind: str) -> None:
    """2,000 draws, of which hardly any is left to the host."""
    rows = [SamplingParams(0.5 + index / 100, seed=index, **rules) for index in range(100)]  # type: ignore[arg-type]
    logits = make_logits(3, 100, 5000, 8.0, torch.bfloat16, kind)
    assert_device_samples_the_same(logits, rows, steps=20)
    numbers = [[0.37, *row_numbers(row)] for row in rows]
    left = draw(logits.float(), torch.tensor(numbers, dtype=torch.float64)) < 0
    assert left.float().mean() <= (0.05 if kind == "plain" else 0.3)


def test_numbers_that_lie_on_a_limit_are_left_to_the_host() -> None:
    """Two equal tokens: top_p and typical_p of one half, min_p of 1, a place in the middle."""
    logits = torch.full((1, 200), float("-inf"))
    logits[0, [7, 9]] = 1.0
    for place, row in [
        (0.2, SamplingParams(1.0, top_p=0.5)),
        (0.2, SamplingParams(1.0, typical_p=0.5)),
        (0.2, SamplingParams(1.0, min_p=1.0)),
        (0.5, SamplingParams(1.0, top_k=2)),
    ]:
        numbers = torch.tensor([[place, *row_numbers(row)]], dtype=torch.float64)
        assert draw(logits, numbers).tolist() == [-1]
        numbers = torch.tensor([[0.7, *row_numbers(replace(row, top_p=0.6, typical_p=0.6, min_p=0.9))]])
        assert draw(logits, numbers.double()).tolist() == [9]


class _OtherRounding(TorchDispatchMode):
    """Rounds fp64 otherwise than a CPU, by some 1e-14: functions alike for equal values, sums at random."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if name in {"exp_", "log", "special_entr"} and found.dtype == torch.float64:
            found *= 1 + 1e-14 * (found * 1e9).sin().nan_to_num()
        elif name in {"cumsum", "sum"} and found.dtype == torch.float64:
            found *= 1 + 1e-14 * (torch.rand_like(found) - 0.5)
        return found


@settings(max_examples=100, deadline=None)
@given(
    st.lists(params, min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.sampled_from([100, 200, 2000]),
    st.sampled_from(KINDS),
)
@example([SamplingParams(1.0, top_p=1 / 3, seed=seed) for seed in range(30)], 0, 3, "equal")
@example([SamplingParams(1.0, min_p=1.0, seed=seed) for seed in range(30)], 0, 3, "equal")
@example([SamplingParams(1.0, top_p=0.75, seed=seed) for seed in range(30)], 0, 200, "few")
def test_another_devices_rounding_changes_no_token(
    rows: list[SamplingParams], seed: int, width: int, kind: str
) -> None:
    logits = make_logits(seed, len(rows), width, 3.0, torch.bfloat16, kind)
    expected = choose(logits, states_of(rows))
    sampler = DeviceSampler(len(rows), width, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsserve.sampling.gpu_sampler.draw", _draw_rounding_otherwise)
        assert sampler.launch(logits, states_of(rows)).read() == expected


def _draw_rounding_otherwise(logits: torch.Tensor, numbers: torch.Tensor, with_rules: bool) -> torch.Tensor:
    with _OtherRounding():
        return draw(logits, numbers, with_rules)


def test_spare_rows_of_a_graph_may_hold_anything() -> None:
    """Zeros as the tensors begin with, and what earlier steps left; the others' tokens do not change."""
    logits = make_logits(5, 6, 40_000, 4.0, torch.float32, "plain")
    rows = [SamplingParams(0.9, top_k=30, typical_p=0.9, seed=1), SamplingParams(1.0, seed=2)]
    numbers = torch.zeros(6, 1 + ROW_NUMBERS, dtype=torch.float64)
    numbers[:2] = torch.tensor([[0.4, *row_numbers(row)] for row in rows])
    alone = draw(logits[:2], numbers[:2])
    logits[3], logits[4] = float("nan"), float("-inf")
    numbers[5] = torch.tensor([0.9, *row_numbers(SamplingParams(1e-5, top_p=0.9))])
    assert torch.equal(draw(logits, numbers)[:2], alone)


class _Counter(TorchDispatchMode):
    """Names the operations that compute something, since views launch nothing, and the devices of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            self.names.append(func._schema.name.removeprefix("aten::"))
        self.devices |= {each.device.type for each in tree_leaves(found) if isinstance(each, torch.Tensor)}
        return found


@pytest.mark.parametrize(("with_rules", "most"), [(False, 40), (True, 135)])
@pytest.mark.parametrize("width", [100, 33_001, 128_256])
def test_a_graph_can_hold_it(width: int, with_rules: bool, most: int) -> None:
    """On tensors without values nothing can ask for one; nothing comes from the host; and it stays few operations."""
    with torch.device("meta"):
        logits, numbers = torch.empty(4, width), torch.empty(4, 1 + ROW_NUMBERS, dtype=torch.float64)
    with _Counter() as counter:
        tokens = draw(logits, numbers, with_rules)
    assert tokens.shape == (4,) and tokens.dtype == torch.int64
    assert counter.devices == {"meta"}
    assert not {"_local_scalar_dense", "nonzero", "lift_fresh", "copy_", "masked_select"} & set(counter.names)
    assert len(counter.names) <= most
