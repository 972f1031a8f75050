"""Writes configs/grafana/dsserve.json, the Grafana dashboard: its panels as a list of queries, laid out in rows.

Shows rank 0's metrics (`dsserve.observability.metrics`) of all servers that the variables choose. Draws nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

FILE = Path(__file__).resolve().parents[2] / "configs" / "grafana" / "dsserve.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Grafana's variables, chosen at the top of the page.
CHOSEN = '{model_name=~"$model_name",instance=~"$instance"}'
WINDOW = "[$__rate_interval]"
COLUMNS, PANEL_COLUMNS, PANEL_LINES = 24, 8, 8
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Query:
    """PromQL and how its series are called."""

    promql: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One chart. `unit` is Grafana's: s, percentunit, reqps, short, bytes, none."""

    title: str
    unit: str
    queries: Sequence[Query]
    description: str = ""
    stacked: bool = False


def rate(counter: str, by: str = "", match: str = "") -> str:
    """A counter's growth a second over all chosen servers."""
    chosen = CHOSEN.replace("}", f",{match}}}") if match else CHOSEN
    return f"sum{f' by ({by})' if by else ''} (rate({counter}{chosen}{WINDOW}))"


def quantiles(histogram: str) -> list[Query]:
    """p50, p95 and p99 over all chosen servers."""
    buckets = rate(f"{histogram}_bucket", "le")
    return [Query(f"histogram_quantile({q}, {buckets})", f"p{100 * q:g}") for q in QUANTILES]


def mean(histogram: str) -> str:
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def gauge(name: str, legend: str, how: str = "sum") -> Query:
    return Query(f"{how} ({name}{CHOSEN})", legend)


def rows() -> dict[str, list[Panel]]:
    """All panels, by the row that they stand in."""
    stages = ("queue", "prefill", "decode")
    return {
        "Load": [
            Panel(
                "Sequences", "short",
                [gauge("vllm:num_requests_running", "running"), gauge("vllm:num_requests_waiting", "waiting"),
                 gauge("dsserve:kv_slots", "most"), Query(rate("vllm:num_preemptions_total"), "put back a second")],
                "Texts that run, those that wait for a row or for pages, how many may run, and those that lost pages.",
            ),
            Panel(
                "KV slots in use", "percentunit",
                [gauge("vllm:kv_cache_usage_perc", "{{instance}}", "max by (instance)")],
                "Pages that texts hold. Near 100 % new texts wait, and running ones are put back: add replicas.",
            ),
            Panel(
                "Texts that ended", "reqps",
                [Query(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")],
                "abort: the client went away, or its time was over; error: a fault of the server.", stacked=True,
            ),
            Panel(
                "Requests answered with an error", "reqps",
                [Query(rate("dsserve:request_errors_total", "type, status"), "{{status}} {{type}}")],
                "429: the queue is full; 503: draining or restarting; 4xx else: the clients' fault.", stacked=True,
            ),
            Panel(
                "Tokens", "short",
                [Query(rate("vllm:prompt_tokens_total"), "prompt tokens/s"),
                 Query(rate("vllm:generation_tokens_total"), "new tokens/s")],
            ),
            Panel(
                "Prompt tokens from the prefix cache", "percentunit",
                [Query(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "hits")],
                "Tokens of prompts that were not computed again.",
            ),
        ],
        "Times of clients (from the handler on)": [
            Panel("First token", "s", quantiles("vllm:time_to_first_token_seconds")),
            Panel("Between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
            Panel("Whole text", "s", quantiles("vllm:e2e_request_latency_seconds")),
            Panel(
                "Where the time goes, mean", "s",
                [Query(mean(f"vllm:request_{stage}_time_seconds"), stage) for stage in stages], stacked=True,
            ),
            Panel("Prompt tokens of a text", "short", quantiles("vllm:request_prompt_tokens")),
            Panel("New tokens of a text", "short", quantiles("vllm:request_generation_tokens")),
        ],
        "Engine": [
            Panel("Step", "s", quantiles("dsserve:step_seconds")),
            Panel(
                "Rows and tokens of a step, mean", "short",
                [Query(mean("dsserve:step_batch_size"), "rows"), Query(mean("vllm:iteration_tokens_total"), "tokens")],
            ),
            Panel("Steps", "short", [Query(rate("dsserve:step_seconds_count", "instance"), "{{instance}} steps/s")]),
            Panel(
                "Memory of rank 0's GPU", "bytes",
                [gauge("dsserve:gpu_memory_bytes", "{{instance}} {{kind}}", "max by (instance, kind)")],
                "Empty on CPUs.",
            ),
            Panel(
                "Time since the load", "s",
                [Query(f"time() - dsserve:start_time_seconds{CHOSEN}", "{{instance}}")],
                "A fall to 0 is a restart of the worker.",
            ),
            Panel(
                "Load of the model", "s", [gauge("dsserve:load_seconds", "{{instance}}", "max by (instance)")],
                "From the worker's first line to the ready model.",
            ),
        ],
    }  # fmt: skip


def lay_out() -> Iterator[dict[str, Any]]:
    """Rows and panels as Grafana wants them, three beside each other."""
    number, line = 0, 0
    for title, panels in rows().items():
        number += 1
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": line}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        line += 1
        for index, panel in enumerate(panels):
            number += 1
            below, column = divmod(index, COLUMNS // PANEL_COLUMNS)
            place = {"h": PANEL_LINES, "w": PANEL_COLUMNS, "x": column * PANEL_COLUMNS, "y": line + below * PANEL_LINES}
            yield time_series(number, panel, place)
        line += -(-len(panels) * PANEL_COLUMNS // COLUMNS) * PANEL_LINES


def time_series(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 5, "showPoints": "never", "stacking": stacking}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.unit == "percentunit":
        defaults["max"] = 1
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": q.promql, "legendFormat": q.legend}
            for index, q in enumerate(panel.queries)
        ],
    }


def variables() -> list[dict[str, Any]]:
    """What is chosen at the top of the page: the data source, models, servers."""
    found: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    series = "vllm:num_requests_running"
    for name, label, match in (("model_name", "Model", ""), ("instance", "Server", '{model_name=~"$model_name"}')):
        query = f"label_values({series}{match}, {name})"
        found.append(
            {"name": name, "label": label, "type": "query", "datasource": DATASOURCE, "refresh": 2, "sort": 1,
             "query": {"query": query, "refId": name}, "definition": query,
             "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
        )  # fmt: skip
    return found


def dashboard() -> dict[str, Any]:
    """The whole document, for Grafana 10 and later (import it, or put it into a provisioned folder)."""
    return {
        "uid": "dsserve",
        "title": "DeepSpeed handlers for TorchServe",
        "tags": ["dsserve", "torchserve"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "panels": list(lay_out()),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> None:
    """Write the file."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
