"""The metrics port of a real server: what it counts is what clients got."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from scripts.reliability import balancer
from scripts.reliability.balancer import BalancerError
from scripts.serve.run_dir import Ports
from tests.e2e.conftest import Served, free_ports
from tests.support.scrape import Scrape
from tests.unit.observability.test_metrics import VLLM_STYLE

PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps for the rest of the long, warm afternoon."


def scrape(served: Served) -> Scrape:
    return Scrape.at(Ports(served.record.port).metrics)


def ask(served: Served, **parameters: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, **parameters}
    return httpx.post(f"{served.base_url}/completions", json=body, timeout=120)


def test_counts_are_what_the_clients_got(small: Served) -> None:
    before = scrape(small)
    usages = [ask(small, max_tokens=5).json()["usage"], ask(small, max_tokens=7, n=2).json()["usage"]]
    client = openai.OpenAI(base_url=small.base_url, api_key="none")
    stream = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=40, stop=[" "], stream=True, stream_options={"include_usage": True}
    )
    usages += [chunk.usage.model_dump() for chunk in stream if chunk.usage]
    assert ask(small, max_tokens=-1).status_code == 400
    assert ask(small, prompt="word " * 3000).json()["error"]["code"] == "context_length_exceeded"
    after = scrape(small)

    def grown(name: str, /, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    prompts = [usage["prompt_tokens"] for usage in usages]
    new = sum(usage["completion_tokens"] for usage in usages)
    assert grown("vllm:prompt_tokens_total") == sum(prompts) + prompts[1]  # a prompt counts for each of its texts
    assert grown("vllm:generation_tokens_total") == new
    assert grown("vllm:inter_token_latency_seconds_count") == new - 4
    assert grown("vllm:request_success_total") == 4
    assert grown("vllm:request_success_total", finished_reason="length") == 3
    assert grown("vllm:request_success_total", finished_reason="stop") == 1
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert grown(f"vllm:{name}_seconds_count") == 4, name
    assert grown("vllm:prefix_cache_hits_total") > 0
    assert grown("dsserve:request_errors_total") == 2
    assert grown("dsserve:request_errors_total", type="invalid_request_error", status="400") == 1
    assert grown("dsserve:request_errors_total", type="context_length_exceeded", status="400") == 1
    assert after.sum("vllm:num_requests_running") == after.sum("vllm:num_requests_waiting") == 0
    assert after.sum("dsserve:build_info", model_name="small", model_version="1.0", tensor_parallel_size="1") == 1
    assert not re.search("quick|brown|[0-9a-f]{8}-[0-9a-f]{4}", after.text), "neither text nor ids of requests"


def test_torchserves_own_metrics_are_at_the_next_port(small: Served) -> None:
    own = httpx.get(f"http://127.0.0.1:{Ports(small.record.port).server_metrics}/metrics", timeout=30).text
    families = set(re.findall(r"# TYPE (\S+)", own))
    assert {"Requests2XX", "ts_inference_requests_total", "ts_queue_latency_microseconds"} <= families
    assert not families & {"HandlerTime", "CPUUtilization", "MemoryUsed"}


def test_promtool_reads_a_real_scrape(small: Served) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt-get install prometheus; PyPI has no package)")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(small).text, capture_output=True, text=True, check=False
    )
    complaints = (done.stdout + done.stderr).splitlines()
    assert [line for line in complaints if not line.endswith(VLLM_STYLE)] == []


def test_a_clients_request_id_comes_back_and_is_in_the_log(small: Served) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 2}
    reply = httpx.post(small.url, json=body, headers={"X-Request-Id": "order-66.a_b"}, timeout=120)
    assert reply.headers["x-client-request-id"] == "order-66.a_b"
    server_id = reply.headers["x-request-id"]
    lines = [line for line in small.worker_log().splitlines() if server_id in line]
    assert len(lines) >= 2 and all(f"{server_id} (order-66.a_b): " in line for line in lines)
    reply = httpx.post(small.url, json=body, headers={"X-Request-Id": "no plain word"}, timeout=120)
    assert reply.status_code == 200 and "x-client-request-id" not in reply.headers
    assert "no plain word" not in small.worker_log()


def test_an_id_reaches_the_log_through_haproxy(small: Served, tmp_path: Path) -> None:
    """Which sends all names of headers in lower case, and an id of its own where a client has none."""
    try:
        balancer.find_haproxy()
    except BalancerError as error:
        pytest.skip(str(error))
    server = f"127.0.0.1:{small.record.port}"
    with balancer.running(tmp_path, free_ports().inference, small.record.name, [server]) as front:
        front.wait_until("s1", True, 30)
        body, headers = (
            {"prompt": PROMPT, "max_tokens": 2},
            {"X-Request-Id": "order-67", "X-Client-Request-Id": "false"},
        )
        reply = httpx.post(f"{front.url}/v1/completions", json=body, headers=headers, timeout=120)
        made = httpx.post(f"{front.url}/v1/completions", json=body, timeout=120).headers["x-client-request-id"]
    assert reply.headers["x-client-request-id"] == "order-67"
    assert f"{reply.headers['x-request-id']} (order-67): " in small.worker_log()
    assert f"({made}): " in small.worker_log() and made in (tmp_path / "haproxy.log").read_text()
