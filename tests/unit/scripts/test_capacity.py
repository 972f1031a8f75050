"""The capacity page: its fit, its simulation against arithmetic and queueing theory, its plan, and its page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from scripts.bench.open_load import poisson
from scripts.capacity import plan as capacity
from scripts.capacity.load import BURSTY, Demand, Job
from scripts.capacity.plan import Goals, check, check_table, plan, simulate
from scripts.capacity.route import LEAST, POLICIES, PREFIX, ROUND_ROBIN, Router
from scripts.capacity.sim import Failure, Replica, Simulation, failures
from scripts.capacity.speed import CapacityError, Speed, fit, line
from tests.conftest import ROOT

MEASURED = ROOT / "configs" / "measurements" / "failover.json"
PICTURE = ROOT / "configs" / "measurements" / "capacity.svg"
BENCH = ROOT / "configs" / "measurements" / "h100-1b.json"
SPEED = Speed(step_ms=10.0, row_ms=1.0, prefill_ms=20.0, prompt_token_ms=0.5)


def run(jobs: list[Job], replicas: int = 1, policy: str = LEAST, broken: tuple[Failure, ...] = (), most: int = 32):
    return Simulation(SPEED, replicas, Router(policy), most).run(jobs, broken)


def job(at_s: float = 0.0, prompt: int = 16, new: int = 9, beginning: int = 0, shared: int = 0) -> Job:
    return Job(at_s, prompt, new, beginning, shared)


def test_lines_go_through_their_points_and_never_start_below_zero() -> None:
    assert line([1, 4, 8], [5.0, 11.0, 19.0]) == pytest.approx((3.0, 2.0))
    assert line([1, 2], [1.0, 4.0]) == pytest.approx((0.0, 1.8))
    assert line([1, 2], [4.0, 2.0]) == pytest.approx((3.0, 0.0))


@pytest.mark.parametrize("part", ["http", "alone"])
def test_a_speed_is_read_from_a_benchmark(part: str) -> None:
    numbers = {
        str(n): {"inter_token_ms_median": SPEED.decode_ms(n), "first_token_ms_median": SPEED.admit_ms(16 * n)}
        for n in (1, 4, 16)
    }
    report = {"setting": {"prompt_tokens": 16}, part: {**numbers, "16 sampled": {}}}
    found = fit(report)
    assert (found.step_ms, found.row_ms) == pytest.approx((10.0, 1.0))
    assert (found.prefill_ms, found.prompt_token_ms) == pytest.approx((20.0, 0.5))
    with pytest.raises(CapacityError, match="two numbers"):
        fit({"setting": {"prompt_tokens": 16}, part: {"1": numbers["1"]}})


def test_a_request_alone_takes_its_prefill_and_its_calls() -> None:
    (found,) = run([job(at_s=1.0)])
    assert found.first_ms == pytest.approx(28.0)
    assert found.end_s == pytest.approx(1.0 + 0.028 + 8 * 0.011)  # two calls of four steps
    assert found.token_ms == pytest.approx(11.0)


def test_who_comes_during_a_call_waits_for_its_end_and_joins() -> None:
    early, late = run([job(new=5), job(at_s=0.030)])
    # 28 ms for the first token, then a call of four steps until 72 ms; the second is prefilled alone after it.
    assert early.end_s == pytest.approx(0.072)
    assert late.first_ms == pytest.approx(72.0 - 30.0 + 28.0)


def test_the_seventeenth_waits_for_a_row() -> None:
    found = run([job(new=5) for _ in range(17)])
    first = sorted(request.first_ms or 0.0 for request in found)
    together = SPEED.admit_ms(15 * 16)
    assert first[0] == pytest.approx(28.0)  # the first was begun before the others came, in the same instant
    assert first[1:16] == pytest.approx([28.0 + SPEED.decode_ms(1) + together] * 15)
    assert first[16] > first[15] + 3 * SPEED.decode_ms(16)


def test_waiting_is_what_queueing_theory_says() -> None:
    """One row, one token: with random arrivals and a constant time of service s one waits load x s / (2 (1 - load))."""
    speed = Speed(0.0, 0.0, 100.0, 0.0, max_running=1)
    for load in (0.5, 0.8):
        jobs = [job(at_s=at, new=1) for at in poisson(load / 0.1, 10_000.0, seed=4)]
        requests = Simulation(speed, 1, Router(LEAST), 32).run(jobs)
        waits = [(request.first_ms or 0.0) - 100.0 for request in requests]
        assert statistics.fmean(waits) == pytest.approx(load * 100.0 / (2 * (1 - load)), rel=0.05)


def test_the_routers() -> None:
    replicas = [Replica(number) for number in range(4)]
    robin = Router(ROUND_ROBIN)
    assert [robin.choose(replicas, job(), 9).number for _ in range(5)] == [0, 1, 2, 3, 0]
    replicas[2].up = False
    assert [robin.choose(replicas, job(), 9).number for _ in range(3)] == [1, 3, 0]
    replicas[0].waiting.extend(run([job()]) * 2)
    replicas[1].waiting.extend(run([job()]))
    assert Router(LEAST).choose(replicas, job(), 9).number == 3
    assert Router(LEAST).choose(replicas[:2], job(), 1) is None
    with pytest.raises(ValueError, match="unknown"):
        Router("fastest")


def test_beginnings_stay_with_their_replica_until_it_has_too_much() -> None:
    replicas = [Replica(number) for number in range(8)]
    router = Router(PREFIX)
    homes = {beginning: router.choose(replicas, job(beginning=beginning), 9).number for beginning in range(50)}
    assert len(set(homes.values())) == 8
    assert homes == {b: Router(PREFIX).choose(replicas, job(beginning=b), 9).number for b in homes}
    home = replicas[homes[0]]
    home.waiting.extend(run([job()]) * 3)
    assert router.choose(replicas, job(beginning=0), 9) is not home


def test_a_kept_beginning_is_not_computed_again() -> None:
    speed_ms = [request.first_ms for request in run([job(shared=10), job(at_s=5.0, shared=10), job(9.0, 16, 9, 1, 10)])]
    assert speed_ms == pytest.approx([28.0, 23.0, 28.0])


def test_a_dead_replica_loses_what_it_had_begun_and_nothing_else() -> None:
    """At 20 ms one request has no token yet; of those at 35 ms all have one."""
    jobs = [job(), job(), job(at_s=0.001), job(at_s=0.001)]
    early = run(jobs, 2, ROUND_ROBIN, (Failure(0.020, 0, 1.0),))
    assert [request.cut for request in early] == [False] * 4 and all(request.end_s for request in early)
    late = run(jobs, 2, ROUND_ROBIN, (Failure(0.035, 0, 1.0),))
    assert sum(request.cut for request in late) == 1 and sum(request.end_s is not None for request in late) == 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(1, 4), st.sampled_from(POLICIES), st.integers(1, 32),
    st.lists(st.tuples(st.floats(0, 2), st.integers(0, 3), st.floats(0.1, 1)), max_size=3),
)  # fmt: skip
def test_every_request_ends_or_is_cut(given_jobs, replicas: int, policy: str, most: int, deaths) -> None:
    jobs = sorted(Job(at, 16, new, beginning, 8) for at, new, beginning in given_jobs)
    broken = tuple(Failure(at, replica % replicas, down) for at, replica, down in deaths)
    for request in run(jobs, replicas, policy, broken, most):
        assert (request.end_s is None) == request.cut
        if not request.cut:
            assert request.first_ms >= 28.0 - 0.5 * 8 - 1e-6
            assert request.end_s - request.first_s >= (request.job.new_tokens - 1) * 0.011 - 1e-9


def test_demands_have_their_rate_and_bursts_are_bursty() -> None:
    for arrivals in ("poisson", BURSTY):
        jobs = Demand(50.0, 10, 20, arrivals).jobs(1000.0, seed=2)
        assert len(jobs) == pytest.approx(50_000, rel=0.1)
        assert [item.at_s for item in jobs] == sorted(item.at_s for item in jobs)
        assert statistics.fmean(item.new_tokens for item in jobs) == pytest.approx(20, rel=0.05)
        counts = [0] * 1000
        for item in jobs:
            counts[int(item.at_s)] += 1
        spread = statistics.pvariance(counts) / statistics.fmean(counts)
        assert (spread > 5) == (arrivals == BURSTY) and (spread < 1.3) == (arrivals != BURSTY)


def test_failures_come_as_often_as_asked() -> None:
    found = failures(100, 36_000.0, 1.0, 60.0, seed=1)
    assert len(found) == pytest.approx(1000, rel=0.1) and {item.down_s for item in found} == {60.0}


def test_the_plan_is_the_fewest_replicas_that_keep_the_goals() -> None:
    demand, goals = Demand(60.0, 64, 32), Goals(200.0, 60.0)
    found = plan(SPEED, demand, goals, LEAST)
    jobs = demand.jobs(capacity.SECONDS + capacity.WARM_S, 1)
    assert found.keeps(goals) and not simulate(SPEED, found.replicas - 1, jobs).keeps(goals)
    with pytest.raises(CapacityError, match="one request alone takes 52 ms"):
        plan(SPEED, demand, Goals(50.0, 60.0), LEAST)


def test_the_command_line(tmp_path: Path) -> None:
    options = ["--bench", str(BENCH), "--rate", "40", "--hours", "0.1", "--spare", "2"]
    done = CliRunner().invoke(app(), options)
    assert done.exit_code == 0 and "with 2 spare" in done.output and "die" in done.output
    lines = tmp_path / "bench.txt"
    lines.write_text("a table\n" + json.dumps(json.loads(BENCH.read_text())))
    assert CliRunner().invoke(app(), ["--bench", str(lines), *options[2:]]).output == done.output
    lines.write_text("nothing")
    assert CliRunner().invoke(app(), ["--bench", str(lines)]).exit_code == 1
    assert CliRunner().invoke(app(), []).exit_code == 1


def app():
    import typer

    found = typer.Typer()
    found.command()(capacity.main)
    return found


def test_the_simulation_meets_the_two_servers_as_measured() -> None:
    rows = check(json.loads(MEASURED.read_text()))
    assert {row["servers"] for row in rows} == {1, 2}
    assert max(abs(row["simulated"] / row["measured"] - 1) for row in rows) < 0.2
    table = check_table(rows)
    assert table in (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    description = ElementTree.parse(PICTURE).find(".//{http://purl.org/dc/elements/1.1/}description")
    assert description is not None and description.text == table
