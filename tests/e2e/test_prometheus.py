"""A real Prometheus with configs/prometheus scrapes a real server: dashboard, alerts and autoscaler have answers.

Where `prometheus` is not installed all of it is skipped; `tests/unit/configs/test_dashboard.py` holds the names all the
same.
"""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from scripts.observe import dashboard_picture, prometheus
from scripts.observe.prometheus import Prometheus, PrometheusError
from scripts.serve.run_dir import Ports
from tests.conftest import ROOT
from tests.e2e.conftest import RUNNING, Served, free_ports

SCRAPE_S = 1
ADAPTER = ROOT / "configs" / "kubernetes" / "components" / "autoscaling" / "adapter-values.yaml"
# What the pods' scrape configuration puts to their series.
POD = {"namespace": "dsserve", "pod": "server-0"}
PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps for the rest of the long, warm afternoon."
ON_GPUS_ALONE = "Memory of rank 0's GPU"


@pytest.fixture(scope="module")
def scraped(small: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    try:
        prometheus.find()
    except PrometheusError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("prometheus")
    config = prometheus.configuration([Ports(small.record.port)], SCRAPE_S, POD)
    with prometheus.running(folder, free_ports().inference, config) as target:
        target.wait_for('up{job="dsserve"} == 1', 30)
        yield target


def load(served: Served, count: int) -> None:
    """Texts that wait, that end by length and by a stop string, and two refused requests."""
    bodies = [{"prompt": PROMPT, "max_tokens": 24, "stop": [" "] if number % 2 else []} for number in range(count)]
    bodies += [{"prompt": PROMPT, "max_tokens": -1}] * 2
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        replies = pool.map(lambda body: httpx.post(f"{served.base_url}/completions", json=body, timeout=120), bodies)
        assert {reply.status_code for reply in replies} == {200, 400}


@pytest.fixture(scope="module")
def busy(small: Served, scraped: Prometheus) -> tuple[Prometheus, float, float]:
    """Prometheus after some scrapes of a server that worked, and the time of them."""
    start = time.time()
    for _ in range(4):
        load(small, RUNNING + 2)
        time.sleep(2 * SCRAPE_S)
    return scraped, start, time.time()


def test_every_panel_but_the_gpus_has_numbers(busy: tuple[Prometheus, float, float]) -> None:
    target, start, end = busy
    for panel in dashboard_picture.read_panels():
        if panel["type"] == "row" or panel["title"] == ON_GPUS_ALONE:
            continue
        for query in panel["targets"]:
            filled = dashboard_picture.fill(query["expr"], SCRAPE_S, SCRAPE_S)
            series = target.query_range(filled, start, end, SCRAPE_S)
            assert series, f"{panel['title']}: no series of {query['expr']}"
            assert any(math.isfinite(value) for found in series for _, value in found.samples), panel["title"]


def test_the_dashboard_is_drawn(busy: tuple[Prometheus, float, float], tmp_path: Path) -> None:
    target, start, end = busy
    picture = tmp_path / "dashboard.png"
    assert dashboard_picture.draw(target, picture, start, end, SCRAPE_S, SCRAPE_S) == [ON_GPUS_ALONE]
    with Image.open(picture) as image:
        assert image.width > 1000 and "First token" in image.text["Description"]


def test_the_alerts_are_loaded_and_none_fails(busy: tuple[Prometheus, float, float]) -> None:
    target, _, _ = busy
    (group,) = target.get("rules")["groups"]
    wanted = {rule["alert"] for rule in yaml.safe_load(prometheus.RULES.read_text())["groups"][0]["rules"]}
    assert {rule["name"] for rule in group["rules"]} == wanted
    assert all(rule["health"] == "ok" and not rule.get("lastError") for rule in group["rules"])


def test_both_ports_of_a_server_are_scraped(busy: tuple[Prometheus, float, float]) -> None:
    target, _, _ = busy
    jobs = {series.labels["job"]: series.samples[0][1] for series in target.query("up")}
    assert jobs == {"dsserve": 1.0, "torchserve": 1.0}


def test_the_autoscalers_query_sees_what_waits(small: Served, busy: tuple[Prometheus, float, float]) -> None:
    """The query as the Prometheus adapter fills it: the worst of the last half minute, a pod at a time."""
    target, _, _ = busy
    (rule,) = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    assert target.names(rule["seriesQuery"]) == {"vllm:num_requests_waiting", "vllm:num_requests_running"}
    for name, least in (("vllm:num_requests_running", RUNNING), ("vllm:num_requests_waiting", 1)):
        filled = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
        matchers = ",".join(f'{label}=~"{value}"' for label, value in POD.items())
        filled = filled.replace("<<.LabelMatchers>>", matchers)
        load(small, RUNNING + 2)
        (series,) = target.query(filled)
        assert series.labels == {"pod": POD["pod"]} and series.samples[0][1] >= least, filled
