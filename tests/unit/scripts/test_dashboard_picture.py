"""The dashboard's picture without a Prometheus: what is asked, how gaps show, what is drawn. `tests/e2e` has a run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from scripts.observe import dashboard, dashboard_picture, dashboard_run, prometheus
from scripts.observe.prometheus import Series
from scripts.serve.run_dir import Ports


class Constant:
    """Answers every query with one series, and notes it."""

    def __init__(self, empty: str) -> None:
        self.asked: list[str] = []
        self._empty = empty

    def query_range(self, promql: str, start: float, end: float, step_s: float) -> list[Series]:
        self.asked.append(promql)
        samples = [(start + at * step_s, float(at)) for at in range(int((end - start) / step_s))]
        return [] if self._empty in promql else [Series({"instance": "a:1"}, samples)]


def test_queries_are_filled_as_grafana_fills_them() -> None:
    expr = 'rate(a{model_name=~"$model_name",instance=~"$instance"}[$__rate_interval])'
    assert dashboard_picture.fill(expr, 10, 10) == 'rate(a{model_name=~".*",instance=~".*"}[40s])'
    assert dashboard_picture.fill(expr, 60, 10).endswith("[70s])")
    assert dashboard_picture.name("{{status}} {{type}}!", {"status": "400"}) == "400 !"


def test_every_query_of_the_file_is_asked_and_what_is_empty_is_named(tmp_path: Path) -> None:
    target, picture = Constant("gpu_memory"), tmp_path / "a.png"
    assert dashboard_picture.draw(target, picture, 0, 300, 10, 10) == ["Memory of rank 0's GPU"]  # type: ignore[arg-type]
    panels = json.loads(dashboard.text())["panels"]
    assert len(target.asked) == sum(len(panel.get("targets", [])) for panel in panels)
    assert not any("$" in promql for promql in target.asked)
    with Image.open(picture) as image:
        assert image.text["Description"] == "; ".join(panel["title"] for panel in panels)


def test_no_line_is_drawn_where_samples_are_missing() -> None:
    found = dashboard_picture.with_gaps([(0, 1.0), (10, 2.0), (50, 3.0), (60, 4.0)], 10)
    assert [at for at, _ in found] == [0, 10, 20, 50, 60]
    assert [math.isnan(value) for _, value in found] == [False, False, True, False, False]
    assert dashboard_picture.with_gaps([], 10) == []


def test_the_runs_prometheus_is_the_projects_with_other_targets() -> None:
    config = prometheus.configuration([Ports(100), Ports(200)])
    own = yaml.safe_load(prometheus.CONFIG.read_text())
    targets = {job["job_name"]: job.pop("static_configs")[0]["targets"] for job in config["scrape_configs"]}
    assert targets == {"dsserve": ["127.0.0.1:102", "127.0.0.1:202"], "torchserve": ["127.0.0.1:103", "127.0.0.1:203"]}
    for job in own["scrape_configs"]:
        del job["static_configs"]
    assert config == own and own["global"]["scrape_interval"] == f"{dashboard_run.SCRAPE_S}s"


def test_the_load_rises_falls_and_is_mixed() -> None:
    moments = dashboard_run.arrivals([1.0, 8.0, 2.0], 100.0)
    counts = [sum(part * 100 <= at < (part + 1) * 100 for at in moments) for part in range(3)]
    assert moments == sorted(moments) and counts == [pytest.approx(wanted, rel=0.3) for wanted in (100, 800, 200)]
    bodies = dashboard_run.bodies(["one", "two"])
    assert sum(body["temperature"] < 0 for body in bodies) == len(bodies) // 20
    assert sum(body["prompt"].startswith(dashboard_run.BEGINNING) for body in bodies) == len(bodies) // 2
    assert {body["max_tokens"] for body in bodies} == set(dashboard_run.NEW_TOKENS)


def test_a_missing_program_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(prometheus.PrometheusError, match=re.escape("apt-get install prometheus")):
        prometheus.find("promtool")
