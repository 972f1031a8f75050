"""The cost of metrics: the comparison finds a cost that is there and none that is not; every other call is watched."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch

from dsserve.core.step_plan import StepPlan
from dsserve.engine.engine import Engine
from dsserve.observability.metrics import Metrics
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize
from dsserve.runner.base import StepLogits
from scripts.bench import metrics as bench_metrics
from scripts.bench.metrics import NEW_TOKENS, Calls, NoText, Switch, compare, count_alone, table, turn
from tests.conftest import ROOT
from tests.support.paged import make_scheduler

ROWS = 2
MEASURED = ROOT / "configs" / "measurements" / "metrics_cost.json"


class ZeroRunner:
    """Gives every row token 0."""

    size = KVSize.of_rows(ROWS, 4096)

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        rows = len(plan.segments)
        return StepLogits(torch.zeros(rows, 4)) if rows else None


def make_engine(metrics: Metrics) -> tuple[Engine, Switch]:
    switch = Switch(metrics)
    rank = RankInfo(0, 0, 1, 1)
    scheduler = make_scheduler(ZeroRunner.size)
    engine = Engine(ZeroRunner(), rank, lambda _: NoText(None), frozenset(), scheduler, observer=switch)  # type: ignore[arg-type]
    return engine, switch


@pytest.mark.parametrize("cost", [0.0, 0.05])
def test_a_cost_is_found_under_a_machine_that_slows_down(cost: float) -> None:
    dice, pairs = random.Random(1), []
    for number in range(40):
        base = 0.01 * (1 + number / 10)  # in the end five times as slow as at first
        both = []
        for order in range(2):
            watched = [(order + index) % 2 == 0 for index in range(17)]
            seconds = [base * (1 + cost * on) * dice.uniform(0.97, 1.03) for on in watched]
            both.append(Calls(seconds, watched))
        pairs.append((both[0], both[1]))
    found = compare(pairs)
    assert found["slower"] == pytest.approx(cost, abs=0.005)
    assert found["slower_low"] - 0.005 < cost < found["slower_high"] + 0.005


def test_each_place_of_a_turn_is_watched_in_one_turn_of_a_pair() -> None:
    metrics = Metrics("m", "1")
    engine, switch = make_engine(metrics)
    one, other = (turn(engine, switch, time.perf_counter, ROWS, number) for number in range(2))
    assert one.watched == [not on for on in other.watched] and one.watched[0]
    steps = 1 + (NEW_TOKENS - 1)
    assert len(one.seconds) == 1 + (steps - 1) // bench_metrics.STEPS_A_CALL
    counted = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert counted["vllm:generation_tokens_total"] == ROWS * steps, "one turn's worth of two"


def test_all_that_a_turn_tells_is_counted_alone() -> None:
    metrics = Metrics("m", "1")
    engine, switch = make_engine(metrics)
    assert 0.1 < count_alone(engine, switch, time.perf_counter, ROWS) < 1000
    assert switch.told is None


def test_the_page_has_the_measured_cost_and_it_is_below_the_aim() -> None:
    reports = json.loads(MEASURED.read_text())
    assert table(*reports) in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert {report["shape"] for report in reports} == {"tiny", "135m"}
    assert all(found["slower"] < bench_metrics.AIM for report in reports for found in report["rows"].values())
