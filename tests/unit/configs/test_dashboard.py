"""The Grafana dashboard, the alerts and the autoscaler's rules name what rank 0 serves; PromQL by two parsers.

promql-parser reads every query; promtool, where it is installed, what only Prometheus itself knows. No Grafana runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import torch
import yaml
from PIL import Image
from promql_parser import AggModifierType, AggregateExpr, VectorSelector

from dsserve.core.errors import RequestError
from dsserve.observability.metrics import Metrics
from scripts.observe import dashboard
from scripts.observe.dashboard_run import PICTURE
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

PROMETHEUS = ROOT / "configs" / "prometheus"
RULES, HOSTS, PODS = (PROMETHEUS / f"{name}.yml" for name in ("alerts", "prometheus", "kubernetes"))
RULE_TESTS = ROOT / "tests" / "unit" / "configs" / "alerts.test.yml"
AUTOSCALING = ROOT / "configs" / "kubernetes" / "components" / "autoscaling"
# What Prometheus adds to every series, and the one that it makes itself.
OF_THE_SCRAPE, UP = {"instance", "job"}, "up"


@pytest.fixture(scope="module")
def emitted() -> dict[str, set[str]]:
    """Every series that rank 0 can serve, with the names of its labels; on a GPU."""
    metrics = Metrics("m", "1.0")
    metrics.loaded(1.0, {"name": "autotp"}, 4)
    metrics.refused(RequestError("no"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 1)
        metrics.watch_memory(torch.device("cuda"))
        families = list(metrics.registry.collect())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def queries() -> list[str]:
    """PromQL of every panel, with Grafana's variables filled in."""
    panels = json.loads(dashboard.text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [
        expr.replace("$__rate_interval", "5m").replace("$model_name", "a").replace("$instance", "b") for expr in found
    ]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def read(query: str) -> tuple[dict[str, set[str]], set[str]]:
    """The series that a query reads with the labels that it matches, and those by which it adds up."""
    series: dict[str, set[str]] = {}
    groups: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, VectorSelector):
            assert node.name, query
            series.setdefault(node.name, set()).update(matcher.name for matcher in node.matchers.matchers)
        elif isinstance(node, AggregateExpr) and node.modifier:
            assert node.modifier.type == AggModifierType.By, query
            groups.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    return series, groups


def unknown(query: str, emitted: dict[str, set[str]]) -> set[str]:
    """What a query asks for that nothing gives: series, or labels that they do not have."""
    series, groups = read(query)
    labels = {name: emitted.get(name, set()) | OF_THE_SCRAPE for name in series}
    missing = {name for name in series if name not in emitted and name != UP}
    missing |= {f"{name}{{{label}}}" for name, used in series.items() for label in used - labels[name]}
    return missing | {label for label in groups if not all(label in has for has in labels.values())}


@pytest.mark.parametrize("query", [*queries(), *(alert["expr"] for alert in alerts())])
def test_every_query_reads_what_is_served(query: str, emitted: dict[str, set[str]]) -> None:
    assert unknown(query, emitted) == set()


@pytest.mark.parametrize(
    ("query", "missing"),
    [
        ("rate(vllm:no_such_total[5m])", {"vllm:no_such_total"}),
        ('vllm:num_requests_running{user="a"}', {"vllm:num_requests_running{user}"}),
        ("sum by (le) (vllm:num_requests_running)", {"le"}),
        ("up + dsserve:kv_slots", set()),
    ],
)
def test_a_query_of_something_else_is_found(query: str, missing: set[str], emitted: dict[str, set[str]]) -> None:
    assert unknown(query, emitted) == missing


def test_the_dashboard_shows_every_metric_but_what_names_the_build(emitted: dict[str, set[str]]) -> None:
    shown = {re.sub("_(bucket|sum|count)$", "", name) for query in queries() for name in read(query)[0]}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in emitted} - shown == {"dsserve:build_info"}


def test_the_file_is_what_the_script_writes() -> None:
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), "run python -m scripts.observe.dashboard"


def test_the_picture_of_a_run_shows_todays_panels() -> None:
    titles = "; ".join(panel["title"] for panel in dashboard.dashboard()["panels"])
    with Image.open(PICTURE) as image:
        assert image.text["Description"] == titles, "run python -m scripts.observe.dashboard_run"
    assert PICTURE.stat().st_size < 200_000
    panels = sum(panel["type"] == "timeseries" for panel in dashboard.dashboard()["panels"])
    assert f"![the dashboard's {panels} panels over a load run](../{PICTURE.relative_to(ROOT)})" in PAGE


def test_panels_have_ids_and_places_of_their_own_and_variables_that_exist() -> None:
    document = dashboard.dashboard()
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(0 <= panel["gridPos"]["x"] <= 24 - panel["gridPos"]["w"] for panel in panels)
    names = {variable["name"] for variable in document["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w+)\}?", dashboard.text()))
    assert used == names == {"datasource", "model_name", "instance"}


def test_every_alert_says_what_to_do_and_how_bad_it_is() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert["annotations"]) == {"summary", "description"}
    rows = re.findall(r"^\| (`Dsserve.*?) \|", PAGE, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == [alert["alert"] for alert in alerts()]
    tested = yaml.safe_load(RULE_TESTS.read_text())["tests"][0]["promql_expr_test"][-1]["exp_samples"]
    assert {alert["alert"] for alert in alerts()} == {re.findall('alertname="(.+?)"', s["labels"])[0] for s in tested}


def test_the_autoscaler_reads_gauges_that_are_served(emitted: dict[str, set[str]]) -> None:
    """From the autoscaler's names through the adapter's one rule to what rank 0 serves, with nothing left over."""
    (rule,) = yaml.safe_load((AUTOSCALING / "adapter-values.yaml").read_text())["rules"]["custom"]
    found = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert found
    renamed = rule["name"]["as"].replace("$1", r"\1")
    offered = {re.sub(rule["name"]["matches"], renamed, name) for name in emitted if re.fullmatch(found[1], name)}
    scaler = yaml.safe_load((AUTOSCALING / "autoscaler.yaml").read_text())["spec"]
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]} == offered
    assert offered == {"vllm_num_requests_running", "vllm_num_requests_waiting"}
    pods = yaml.safe_load(PODS.read_text())["scrape_configs"][0]["relabel_configs"]
    of_pods = set(rule["resources"]["overrides"])
    assert of_pods <= {item.get("target_label") for item in pods}, "the adapter finds a pod's series by these labels"
    # As the adapter fills its query.
    query = rule["metricsQuery"].replace("<<.Series>>", "vllm:num_requests_waiting").replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", ",".join(f'{label}=~"x"' for label in of_pods))
    assert unknown(query, {name: labels | of_pods for name, labels in emitted.items()}) == set()
    assert unknown(query.replace("waiting", "queued"), emitted)


def test_pods_are_scraped_where_their_annotations_say() -> None:
    pod = yaml.safe_load((ROOT / "configs/kubernetes/base/deployment.yaml").read_text())["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert ports["metrics"] == int(pod["metadata"]["annotations"]["prometheus.io/port"])
    (job,) = yaml.safe_load(PODS.read_text())["scrape_configs"]
    sources = {rule["source_labels"][0]: rule for rule in job["relabel_configs"]}
    assert sources["__meta_kubernetes_pod_container_port_name"]["regex"] == "metrics"
    (static, own) = yaml.safe_load(HOSTS.read_text())["scrape_configs"]
    assert static["job_name"] == job["job_name"] == "dsserve" and own["job_name"] == "torchserve"


def promtool(*words: Path | str) -> str:
    """What promtool says; it must be content."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt-get install prometheus; PyPI has no package)")
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", RULES)
    promtool("test", "rules", RULE_TESTS)


@pytest.mark.parametrize("file", [HOSTS, PODS])
def test_promtool_takes_the_configuration(file: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(file.read_text())
    for job in config["scrape_configs"]:
        # Debian's promtool is built without Kubernetes; the rest of the job is checked.
        if job.pop("kubernetes_sd_configs", None):
            job["static_configs"] = [{"targets": ["pod:8082"]}]
    (tmp_path / "alerts.yml").write_text(RULES.read_text())
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", tmp_path / "config.yml")
