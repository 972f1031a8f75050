"""What the served model's numbers are called and when they move: rank 0, prometheus_client, a registry of our own.

Names are vLLM's (`vllm:`) where the meaning is the same, so that dashboards, autoscalers and the gateway's endpoint
picker that know vLLM know this server; the rest is `dsserve:`. Everything moves once a step, once a call or once a
sequence, never once a token, and no label holds anything that a client sent. A sequence is one text: a request with
several prompts or `n` counts as often, as in vLLM. Does not serve the numbers (`metrics_server`).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Values
from itertools import accumulate
from typing import Any, get_args

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dsserve import __version__
from dsserve.core.errors import RequestError
from dsserve.engine.observer import Load, Observer, Outcome, Step
from dsserve.engine.sequence import Sequence

LABELS = ("model_name", "model_version")

# Upper bounds in seconds: vLLM's, and finer ones below for what a GPU or an idle server takes.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
)  # fmt: skip
_REQUEST_S = (
    0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680
)  # fmt: skip
_STEP_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class WeightedHistogram(Collector):
    """A histogram in which one look may count several times, at the cost of one: the rows of a step share their gap.

    Looks are of one thread, so it has no locks, and it searches its bounds by halves: a fraction of what
    prometheus_client's own takes, for what is counted in every step. A scrape in the middle of a look may lack it.
    """

    def __init__(self, name: str, help_text: str, labels: Mapping[str, str], bounds: Values[float]) -> None:
        self._name, self._help, self._labels = name, help_text, labels
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Counts `value` so many times. One thread at a time."""
        self._counts[bisect_left(self._bounds, value)] += weight
        self._sum += value * weight

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._labels))
        bounds = [str(float(bound)) for bound in self._bounds] + ["+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        return [family]


class Metrics(Observer):
    """All metrics of one worker.

    Args:
        model_name, model_version: TorchServe's, the labels of every series.

    Attributes:
        registry: what a scrape reads.
    """

    def __init__(self, model_name: str, model_version: str) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._labels = dict(zip(LABELS, (model_name, model_version), strict=True))
        self._preempted = 0  # as the engine told last
        self._last_step = 0.0
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def _make_gauges(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Sequences that run.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait for a row or for pages.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV pages that texts hold, 0 to 1.")

    def _make_counters(self) -> None:
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens_total", "Tokens of prompts that were read, those of a reused prefix included."
        )
        self._generation_tokens = self._counter("vllm:generation_tokens_total", "New tokens.")
        self._prefix_queries = self._counter(
            "vllm:prefix_cache_queries_total", "Tokens of prompts that were looked up in the pages of other texts."
        )
        self._prefix_hits = self._counter("vllm:prefix_cache_hits_total", "Tokens of prompts that were found.")
        self._preemptions = self._counter(
            "vllm:num_preemptions_total", "Sequences that lost their pages to others and are computed again."
        )
        success = Counter(
            "vllm:request_success_total",
            "Sequences that are over: stop, length, abort (client gone, timeout), error (a fault of the server).",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        outcomes = get_args(Outcome)
        self._over = {outcome: success.labels(**self._labels, finished_reason=outcome) for outcome in outcomes}
        self._errors = Counter(
            "dsserve:request_errors_total",
            "Requests that were answered with an error, by its code (or type) and its HTTP status.",
            (*LABELS, "type", "status"),
            registry=self.registry,
        )

    def _make_histograms(self) -> None:
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival at the handler to its first token.",
            _FIRST_TOKEN_S,
        )  # fmt: skip
        self._between = self._of_steps(
            "vllm:inter_token_latency_seconds", "Time between a sequence's tokens.", _BETWEEN_TOKENS_S
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the step that reads the prompt.", _REQUEST_S
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From that step's beginning to the first token.", _REQUEST_S
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _REQUEST_S
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_S)
        self._prompt_length = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._text_length = self._histogram("vllm:request_generation_tokens", "New tokens of a sequence.", _TOKENS)
        self._step_tokens = self._of_steps(
            "vllm:iteration_tokens_total", "Tokens that a step computes: of new prompts, and one a row.", _STEP_TOKENS
        )
        self._batch = self._of_steps("dsserve:step_batch_size", "Rows of a step, new prompts included.", _ROWS)
        self._step = self._of_steps("dsserve:step_seconds", "One step, from its plan to the text.", _STEP_S)

    def loaded(self, load_s: float, engine: Mapping[str, Any], rows: int) -> None:
        """The model is ready: how long that took, what it is (`ServedModel.engine`), and how many texts may run."""
        self._gauge("dsserve:load_seconds", "Time from the worker's first line to the ready model.").set(load_s)
        self._gauge("dsserve:start_time_seconds", "When the model was ready, Unix time.").set(time.time())
        self._gauge("dsserve:kv_slots", "Most sequences that run at the same time.").set(rows)
        build = {"version": __version__, **{key: str(value) for key, value in engine.items()}}
        names = (*LABELS, *build)
        info = Gauge("dsserve:build_info", "Always 1; the labels say what serves.", names, registry=self.registry)
        info.labels(**self._labels, **build).set(1)

    def watch_memory(self, device: torch.device) -> None:
        """Shows memory of rank 0's GPU, read at each scrape; nothing on a CPU."""
        if device.type != "cuda":
            return
        names = (*LABELS, "kind")
        gauge = Gauge(
            "dsserve:gpu_memory_bytes",
            "Memory of rank 0's GPU: used (by all processes), reserved (by this one's allocator), total.",
            names,
            registry=self.registry,
        )
        kinds: dict[str, Callable[[], float]] = {
            "used": lambda: (memory := torch.cuda.mem_get_info(device))[1] - memory[0],
            "reserved": lambda: torch.cuda.memory_reserved(device),
            "total": lambda: torch.cuda.mem_get_info(device)[1],
        }
        for kind, read in kinds.items():
            gauge.labels(**self._labels, kind=kind).set_function(read)

    def refused(self, error: RequestError) -> None:
        """A request was answered with an error. Its code and type are ours, out of a few."""
        self._errors.labels(**self._labels, type=error.code or error.kind, status=str(error.status)).inc()

    def stepped(self, step: Step) -> None:
        """See `Observer`."""
        for sequence in step.admitted:
            self._admitted(sequence)
        self._generation_tokens.inc(step.generated)
        self._step_tokens.observe(step.read + step.decoded)
        self._batch.observe(step.decoded + len(step.admitted))
        self._step.observe(step.ended - step.started)
        if step.decoded:  # a row that is decoded had its last token in the step before, so all share the gap
            self._between.observe(step.ended - self._last_step, step.decoded)
        self._last_step = step.ended

    def _admitted(self, sequence: Sequence) -> None:
        """A prompt was read to its end, which gave a first token."""
        size, timeline = len(sequence.request.prompt_ids), sequence.timeline
        self._prompt_tokens.inc(size)
        self._prefix_queries.inc(size)
        self._prefix_hits.inc(sequence.cached_tokens)
        if timeline.admitted is not None and timeline.first_token is not None:
            self._queue.observe(timeline.admitted - timeline.arrived)
            self._prefill.observe(timeline.first_token - timeline.admitted)
            self._first_token.observe(timeline.first_token - timeline.arrived)

    def called(self, load: Load) -> None:
        """See `Observer`."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._kv_usage.set(load.kv_usage)
        self._preemptions.inc(load.preemptions - self._preempted)
        self._preempted = load.preemptions

    def ended(self, sequence: Sequence, outcome: Outcome) -> None:
        """See `Observer`."""
        self._over[outcome].inc()
        timeline = sequence.timeline
        if outcome in ("abort", "error") or timeline.ended is None or timeline.first_token is None:
            return
        self._decode.observe(timeline.ended - timeline.first_token)
        self._whole.observe(timeline.ended - timeline.arrived)
        self._prompt_length.observe(len(sequence.request.prompt_ids))
        self._text_length.observe(sequence.generated)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, LABELS, registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, LABELS, registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, help_text: str, bounds: Values[float]) -> Histogram:
        return Histogram(name, help_text, LABELS, registry=self.registry, buckets=bounds).labels(**self._labels)

    def _of_steps(self, name: str, help_text: str, bounds: Values[float]) -> WeightedHistogram:
        found = WeightedHistogram(name, help_text, self._labels, bounds)
        self.registry.register(found)
        return found
