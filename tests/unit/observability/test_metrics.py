"""Rank 0's metrics: an engine without a model, prometheus_client's parser, promtool where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from dsserve.core.errors import RequestError
from dsserve.core.request import GenerationRequest, Origin
from dsserve.core.step_plan import StepPlan, Wanted
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Observer, Step
from dsserve.observability.metrics import Metrics, WeightedHistogram
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize
from dsserve.runner.base import StepLogits
from tests.conftest import ROOT
from tests.support.paged import make_scheduler
from tests.support.scrape import Scrape

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
VOCABULARY, SLOTS, EOS = 8, 2, 7
LABELS = {"model_name": "test", "model_version": "1.0"}
# What promtool finds fault with in vLLM's names, which are what others look for.
VLLM_STYLE = ("metric names should not contain ':'", 'non-counter metrics should not have "_total" suffix')


class FakeRunner:
    """Gives every row the token that follows its last one, 6 after 5 and 5 after 6, and end-of-text after 4."""

    rows, max_model_len, vocabulary, graph_pool = SLOTS, 1024, VOCABULARY, None
    size = KVSize(SLOTS, 1024, 256, 8)

    def __init__(self) -> None:
        self.fits = True

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        if not plan.segments:
            return None
        last = [segment.tokens[-1] for segment in plan.segments if segment.wanted & Wanted.NEXT]
        follows = {4: EOS, 6: 5}
        logits = torch.zeros(len(last), VOCABULARY)
        for row, token in enumerate(last):
            logits[row, follows.get(token, token + 1)] = 1.0
        reads = any(segment.start == 0 or len(segment.tokens) > 1 for segment in plan.segments)
        every = [segment for segment in plan.segments if segment.wanted & Wanted.ALL]
        prompts = tuple(torch.zeros(len(segment.tokens), VOCABULARY) for segment in every)
        return StepLogits(logits, prompts, fitted=self.fits or not reads)


class Letters:
    """A text stream of one letter a token."""

    stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        return chr(ord("a") + token)

    def extend(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return ""


class Broken(Letters):
    def push(self, token: int, may_stop: bool = True) -> str:
        raise ValueError("text of a user")


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("test", "1.0")


def make_engine(runner: FakeRunner, observer: Observer, text: Any = Letters) -> Engine:
    scheduler = make_scheduler(runner.size)
    return Engine(runner, RankInfo(0, 0, 1, 1), lambda _: text(), frozenset({EOS}), scheduler, observer=observer)  # type: ignore[arg-type, return-value]


def scrape(metrics: Metrics) -> Scrape:
    return Scrape.of(generate_latest(metrics.registry).decode())


def finish(engine: Engine, steps: int = 4) -> None:
    while engine.running or engine.waiting:
        engine.run(steps)


def test_counts_are_those_of_the_requests(runner: FakeRunner, metrics: Metrics) -> None:
    engine = make_engine(runner, metrics)
    metrics.loaded(1.0, {}, SLOTS)
    engine.admit(GenerationRequest("long", (1, 5), 6))
    engine.admit(GenerationRequest("short", (1, 2, 3), 9))  # 4, then end-of-text
    engine.admit(GenerationRequest("waits", (5,), 1))
    engine.run(1)
    now = scrape(metrics)
    assert now.sum("vllm:num_requests_running") == 2 and now.sum("vllm:num_requests_waiting") == 1
    assert now.sum("vllm:kv_cache_usage_perc") == pytest.approx(2 / 256), "two pages of 256"
    finish(engine)
    now = scrape(metrics)
    assert now.sum("vllm:num_requests_running") == now.sum("vllm:num_requests_waiting") == 0
    engine.run(1)  # whoever ended holds pages until the next step
    assert scrape(metrics).sum("vllm:kv_cache_usage_perc") == 0.0
    assert now.sum("vllm:prompt_tokens_total") == 2 + 3 + 1
    assert now.sum("vllm:generation_tokens_total") == 6 + 2 + 1
    assert now.sum("vllm:request_success_total", finished_reason="length") == 2
    assert now.sum("vllm:request_success_total", finished_reason="stop") == 1
    assert now.sum("vllm:request_prompt_tokens_sum") == 6 and now.sum("vllm:request_generation_tokens_sum") == 9
    for name in ("time_to_first_token", "request_queue_time", "request_decode_time", "e2e_request_latency"):
        assert now.sum(f"vllm:{name}_seconds_count") == 3, name
    # Each token that is not a sequence's first has a gap, and each step computes a token a row.
    assert now.sum("vllm:inter_token_latency_seconds_count") == 5 + 1
    assert now.sum("vllm:iteration_tokens_total_sum") == 6 + 5 + 1
    assert now.sum("dsserve:step_batch_size_sum") == 9
    assert now.sum("dsserve:step_batch_size_count") == now.sum("dsserve:step_seconds_count") == 6


def test_times_are_in_order_and_add_up(runner: FakeRunner) -> None:
    class Keep(Observer):
        seen: list[Any]

        def ended(self, sequence: Any, outcome: Any) -> None:
            self.seen.append((sequence.timeline, outcome))

    keep = Keep()
    keep.seen = []
    engine = make_engine(runner, keep)
    engine.admit(GenerationRequest("a", (5,), 3), Origin(arrived=1.0))
    finish(engine)
    ((timeline, outcome),) = keep.seen
    assert outcome == "length" and timeline.arrived == 1.0
    marks = (timeline.admitted, timeline.first_token, timeline.last_token, timeline.ended)
    assert list(marks) == sorted(marks) and marks[0] > 1.0


def test_a_reused_prefix_is_a_hit_in_tokens(runner: FakeRunner, metrics: Metrics) -> None:
    engine = make_engine(runner, metrics)
    prompt = tuple([5, 6] * 12)
    for name in ("first", "again"):
        engine.admit(GenerationRequest(name, prompt, 2))
        finish(engine)
        engine.run(1)
    now = scrape(metrics)
    assert now.sum("vllm:prefix_cache_queries_total") == 48
    assert now.sum("vllm:prefix_cache_hits_total") == 16, "whole pages"
    assert now.sum("vllm:prompt_tokens_total") == 48
    assert now.sum("vllm:iteration_tokens_total_sum") == 24 + 1 + 8 + 1


def test_texts_that_lose_their_pages_are_counted(runner: FakeRunner, metrics: Metrics) -> None:
    runner.size = KVSize(SLOTS, 24, 3, 8)
    engine = make_engine(runner, metrics)
    metrics.loaded(1.0, {}, SLOTS)
    for name in ("old", "young"):
        engine.admit(GenerationRequest(name, (5,), 20))
        engine.run(1)
    assert scrape(metrics).sum("vllm:num_preemptions_total") == 0
    finish(engine)
    now = scrape(metrics)
    assert now.sum("vllm:num_preemptions_total") == engine._scheduler.preemptions > 0
    assert now.sum("vllm:generation_tokens_total") == 40, "what is computed again is no new token"
    finish(engine)
    assert scrape(metrics).sum("vllm:num_preemptions_total") == engine._scheduler.preemptions


def test_clients_that_go_and_sequences_that_fail(runner: FakeRunner, metrics: Metrics) -> None:
    engine = make_engine(runner, metrics)
    engine.admit(GenerationRequest("gone", (5,), 100))
    engine.run(1)
    engine.run(1)
    engine.evict("gone")
    engine.evict("gone")
    engine.run(1)
    engine.evict("unknown")
    now = scrape(metrics)
    assert now.sum("vllm:request_success_total", finished_reason="abort") == 1
    assert now.sum("vllm:num_requests_running") == 0
    assert now.sum("vllm:e2e_request_latency_seconds_count") == 0, "half a text has no latency"
    assert now.sum("vllm:generation_tokens_total") == 2
    broken = make_engine(runner, metrics, Broken)
    broken.admit(GenerationRequest("broken", (1,), 5))
    finish(broken)
    runner.fits = False
    engine.admit(GenerationRequest("big", (1,), 5))
    finish(engine)
    now = scrape(metrics)
    assert now.sum("vllm:request_success_total", finished_reason="error") == 2
    assert now.sum("vllm:generation_tokens_total") == 3, "the broken one's token was there before its text"


def test_one_look_a_step_whatever_the_number_of_rows(runner: FakeRunner) -> None:
    class Count(Observer):
        steps: list[Step]

        def stepped(self, step: Step) -> None:
            self.steps.append(step)

    count = Count()
    count.steps = []
    engine = make_engine(runner, count)
    for name in ("a", "b"):
        engine.admit(GenerationRequest(name, (5,), 4))
    finish(engine)
    assert [(step.decoded, len(step.admitted), step.generated) for step in count.steps] == [
        (0, 2, 2), (2, 0, 2), (2, 0, 2), (2, 0, 2)
    ]  # fmt: skip


def test_a_weighted_histogram_is_prometheus_clients_own_looked_at_as_often() -> None:
    bounds = (0.1, 1.0, 5.0)
    ours, own = CollectorRegistry(), CollectorRegistry()
    weighted = WeightedHistogram("h_seconds", "Help.", LABELS, bounds)
    ours.register(weighted)
    plain = Histogram("h_seconds", "Help.", tuple(LABELS), registry=own, buckets=bounds).labels(**LABELS)
    for value, weight in ((0.05, 3), (0.1, 2), (0.7, 1), (5.0, 4), (9.0, 2)):
        weighted.observe(value, weight)
        for _ in range(weight):
            plain.observe(value)
    found, expected = (Scrape.of(generate_latest(registry).decode()).values for registry in (ours, own))
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key]) for key in expected)


def test_errors_are_counted_by_type_and_hold_no_text(metrics: Metrics) -> None:
    secret = "text of a user"
    metrics.refused(RequestError(secret, param=secret))
    metrics.refused(RequestError(secret, status=429, kind="rate_limit_error", code="rate_limit_exceeded"))
    now = scrape(metrics)
    assert now.sum("dsserve:request_errors_total", type="invalid_request_error", status="400") == 1
    assert now.sum("dsserve:request_errors_total", type="rate_limit_exceeded", status="429") == 1
    assert secret not in now.text


def test_what_is_known_after_the_load(metrics: Metrics) -> None:
    metrics.loaded(12.5, {"name": "autotp", "tensor_parallel_size": 2}, SLOTS)
    metrics.watch_memory(torch.device("cpu"))
    now = scrape(metrics)
    assert now.sum("dsserve:load_seconds") == 12.5 and now.sum("dsserve:kv_slots") == SLOTS
    assert now.sum("dsserve:build_info", name="autotp", tensor_parallel_size="2") == 1
    assert "dsserve:gpu_memory_bytes" not in now.names()


def test_promtool_finds_nothing_but_vllms_style(runner: FakeRunner, metrics: Metrics) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt-get install prometheus; PyPI has no package)")
    engine = make_engine(runner, metrics)
    engine.admit(GenerationRequest("a", (5,), 3))
    finish(engine)
    metrics.loaded(1.0, {"name": "autotp"}, SLOTS)
    metrics.refused(RequestError("no"))
    done = subprocess.run([promtool, "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True)
    complaints = (done.stdout + done.stderr).decode().splitlines()
    assert [line for line in complaints if not line.endswith(VLLM_STYLE)] == []
    assert sum(line.endswith(VLLM_STYLE[1]) for line in complaints) == 1


def test_the_page_names_every_metric(metrics: Metrics) -> None:
    metrics.loaded(1.0, {}, SLOTS)
    section = PAGE.split("\n## Metrics")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:vllm|dsserve):\w+)`", section)) - {"dsserve:gpu_memory_bytes"}
    assert named == {
        family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()
    }
