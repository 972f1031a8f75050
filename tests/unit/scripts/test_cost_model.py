"""The cost model: its terms, the fit to points of known costs, the errors it states, and the documentation's copy."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from scripts.cost import model as cost_model
from scripts.cost.fit import Point, errors, errors_left_out, fit, read_points, solve_not_negative
from scripts.cost.report import other_table, prediction_table, summary_table
from scripts.cost.terms import GROWTH, CostModel, Costs, Measurements, load
from tests.conftest import ROOT

PICTURE = ROOT / "configs" / "measurements" / "cost_model.svg"


def machine(engines: dict[str, list[dict]] | None = None) -> Measurements:
    """10 GB of weights, 10 layers of 1000 values of 2 bytes, 0.001 GB of KV a token, 100 tokens a row."""
    shape = {"layers": 10, "hidden": 1000, "bytes_a_value": 2, "weights_gb": 10.0, "kv_gb_a_token": 0.001}
    return Measurements.model_validate(
        {
            "what": "", "source": "", "shape": shape, "context_tokens": 100,
            "gpus": {"A": {"read_gb_s": 1000, "source": ""}, "B": {"read_gb_s": 500, "source": ""}},
            "link_gb_s": 10, "link_source": "",
            "engines": [{"name": name, "points": points} for name, points in (engines or {}).items()],
        }
    )  # fmt: skip


def measure(costs: dict[str, Costs]) -> tuple[Measurements, list[Point]]:
    """Steps that follow the model exactly; the second rank count's on the slower GPU."""
    model = {gpu: CostModel(machine(), gpu) for gpu in "AB"}

    def series(c: Costs, ranks: int, gpu: str) -> dict:
        return {"ranks": ranks, "gpu": gpu, "ms": {rows: model[gpu].step_ms(c, ranks, rows) for rows in (1, 8, 32)}}

    found = machine({name: [series(c, 1, "A"), series(c, 2, "B")] for name, c in costs.items()})
    return found, read_points(found)


def test_terms_in_milliseconds() -> None:
    model = CostModel(machine())
    assert model.read_ms(1, 0) == pytest.approx(10.0)
    assert model.read_ms(2, 0) == pytest.approx(5.0)
    assert model.read_ms(2, 10) == pytest.approx((10 + 10 * 0.1) / 2)
    assert CostModel(machine(), "B").read_ms(1, 0) == pytest.approx(20.0)
    assert model.transfer_ms(1, 64) == 0
    # 20 all-reduces of 50 rows x 2000 bytes; a rank of two sends them once: 2 MB over 10 GB/s
    assert model.transfer_ms(2, 50) == pytest.approx(0.2)
    assert model.transfer_ms(4, 50) == pytest.approx(0.3)
    step = model.step_ms(Costs(100, 10, 5), 2, 50)
    assert step == pytest.approx(model.read_ms(2, 50) + 0.2 + 10 * 0.1 + 10 * 50 * 0.01 + 20 * 0.005)


def test_bandwidths_are_the_floor() -> None:
    model = CostModel(machine())
    for ranks in (1, 2, 4, 8):
        assert model.step_ms(Costs(0, 0, 0), ranks, 16) == pytest.approx(model.given_ms(ranks, 16))
        assert model.step_ms(Costs(1, 1, 1), ranks, 16) > model.given_ms(ranks, 16)


def test_every_law_is_the_measured_latency_at_two_ranks() -> None:
    assert [[growth(ranks) for ranks in (1, 2, 8)] for growth in GROWTH.values()] == [[0, 1, 1], [0, 1, 3], [0, 1, 7]]


@settings(deadline=None)
@for_all(st.tuples(*[st.floats(0, 200)] * 4), st.floats(0, 50))
def test_the_fit_finds_the_costs_that_made_the_points(own: tuple[float, ...], latency: float) -> None:
    costs = {"one": Costs(own[0], own[1], latency), "two": Costs(own[2], own[3], latency)}
    given, points = measure(costs)
    found = fit(given, points)
    for name in costs:
        assert found[name] == pytest.approx(costs[name], abs=1e-4)
    assert max(map(abs, errors(given, points, found))) < 1e-6
    assert max(map(abs, errors_left_out(given, points))) < 1e-6


def test_the_error_of_a_point_that_is_off_is_stated() -> None:
    costs = {"one": Costs(50, 2, 4), "two": Costs(80, 1, 4)}
    given, points = measure(costs)
    off = [*points[:3], points[3]._replace(ms=points[3].ms * 1.25), *points[4:]]
    assert errors(given, off, costs) == pytest.approx([0, 0, 0, -0.2, *[0] * (len(points) - 4)], abs=1e-9)
    assert errors_left_out(given, off)[3] == pytest.approx(-0.2, abs=1e-6)
    row = next(line for line in summary_table(given, off, costs).splitlines() if line.startswith("| one"))
    assert "| 3.3% / 20.0% |" in row


def test_a_cost_below_zero_becomes_zero_and_the_rest_is_solved_again() -> None:
    matrix, target = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])
    assert solve_not_negative(matrix, target) == pytest.approx([2.0, 0.0])


@settings(deadline=None)
@for_all(st.tuples(st.floats(0, 100), st.floats(0.1, 5), st.floats(0, 20)), st.sampled_from([2, 4, 8]))
def test_replicas_win_from_where_both_are_equally_fast(values: tuple[float, float, float], ranks: int) -> None:
    model, costs = CostModel(machine()), Costs(*values)
    rows = model.rows_where_replicas_win(costs, ranks)

    def lead(total: float) -> float:  # of one group over two replicas
        return model.step_ms(costs, ranks // 2, total / 2) - model.step_ms(costs, ranks, total)

    if rows == 0:
        assert lead(1e-3) <= 0
    else:
        assert math.isfinite(rows) and lead(rows) == pytest.approx(0, abs=1e-6)
        assert lead(rows * 0.9) > 0 > lead(rows * 1.1)


def test_more_ranks_stop_helping_one_row_where_the_latency_outgrows_the_weights() -> None:
    model = CostModel(machine())
    assert model.fastest(Costs(10, 1, 0))[1] == 8
    assert model.fastest(Costs(10, 1, 100), "ring")[1] == 2  # 4 ranks save 2.5 ms of weights and pay 4 for latency
    assert model.fastest(Costs(10, 1, 1000))[1] == 1


def test_another_shape_is_measured_against_the_costs_it_did_not_make() -> None:
    given, costs = machine({"one": []}), Costs(100, 10, 5)
    shape = given.shape.model_copy(update={"layers": 20, "weights_gb": 40.0})
    exact = CostModel(given.model_copy(update={"shape": shape}), "B").step_ms(costs, 2, 8)
    points = [{"ranks": 2, "gpu": "B", "ms": {8: exact / 0.9}}]
    other = {"name": "large", "engine": "one", "shape": shape.model_dump(), "points": points}
    table = other_table(Measurements.model_validate({**given.model_dump(), "others": [other]}), {"one": costs})
    assert table.splitlines()[-1] == f"| large | one | B | 2 | {exact / 0.9:.1f} | {exact:.1f} | -10.0% | 40.8 |"


def test_the_measured_points_are_those_of_the_file() -> None:
    points = read_points(load(cost_model.MEASUREMENTS))
    assert len(points) == 32
    assert Point("vLLM 0.20.2", 2, 64, "H200", 4.79) in points and Point("eager step", 1, 8, "H100", 9.2) in points


def test_the_documentation_has_what_the_script_prints() -> None:
    given, costs = fitted()
    points = read_points(given)
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    printed = CliRunner().invoke(cost_model.app).stdout
    for table in (summary_table(given, points, costs), prediction_table(given, costs), other_table(given, costs)):
        assert table in page and table in printed
    assert str(PICTURE.relative_to(ROOT)) in page


def test_the_picture_is_of_these_numbers(tmp_path: Path) -> None:
    fresh = tmp_path / "plot.svg"
    result = CliRunner().invoke(cost_model.app, ["--plot", str(fresh)])
    assert result.exit_code == 0, result.output
    shown, drawn = (numbers_in(path) for path in (PICTURE, fresh))
    assert shown == drawn == prediction_table(*fitted())


def fitted() -> tuple[Measurements, dict[str, Costs]]:
    given = load(cost_model.MEASUREMENTS)
    return given, fit(given, read_points(given))


def numbers_in(picture: Path) -> str | None:
    """The table in an SVG's description."""
    return ElementTree.parse(picture).findtext(".//{http://purl.org/dc/elements/1.1/}description")
