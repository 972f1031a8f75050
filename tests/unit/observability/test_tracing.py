"""Spans of a text's way, and the ids by which a request is known: real OpenTelemetry, in memory."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from dsserve.core.request import GenerationRequest, Origin
from dsserve.core.timeline import Timeline
from dsserve.engine.engine import Engine
from dsserve.engine.observer import Observer
from dsserve.observability import tracing
from dsserve.observability.tracing import Spans, phases, spans_from_env
from dsserve.parallel.rank import RankInfo
from dsserve.protocol.rows import row_origin
from tests.support.paged import make_scheduler
from tests.unit.observability.test_metrics import FakeRunner, Letters

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans_of(requests: list[GenerationRequest], origin: Origin, evict: str | None = None) -> list[ReadableSpan]:
    """What is exported when these requests have run on an engine without a model."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    runner, rank = FakeRunner(), RankInfo(0, 0, 1, 1)
    scheduler = make_scheduler(runner.size)
    engine = Engine(runner, rank, lambda _: Letters(), frozenset({7}), scheduler, observer=Spans(provider, "m"))  # type: ignore[arg-type, return-value]
    for request in requests:
        engine.admit(request, origin)
    if evict:
        engine.evict(evict)
    while engine.running or engine.waiting:
        engine.run(4)
    return list(exporter.get_finished_spans())


def test_a_text_has_a_span_and_its_phases_lie_in_it_without_gaps() -> None:
    origin = Origin(client_id="my-id", traceparent=f"00-{TRACE}-{PARENT}-01")
    found = {span.name: span for span in spans_of([GenerationRequest("a", (5,), 3)], origin)}
    whole, parts = found.pop("generate"), list(found.values())
    assert sorted(found) == ["decode", "detokenize", "prefill", "queue"]
    assert f"{whole.context.trace_id:032x}" == TRACE and f"{whole.parent.span_id:016x}" == PARENT
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    parts.sort(key=lambda part: (part.start_time, part.end_time))
    assert parts[0].start_time == whole.start_time and parts[-1].end_time == whole.end_time
    assert all(first.end_time == second.start_time for first, second in pairwise(parts))
    assert dict(whole.attributes) == {
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "dsserve.request_id": "a",
        "dsserve.client_request_id": "my-id",
        "dsserve.text_index": 0,
        "dsserve.cached_tokens": 0,
    }
    assert whole.status.status_code is StatusCode.UNSET


def test_one_that_never_ran_has_waited_only() -> None:
    found = spans_of([GenerationRequest("a", (5,), 3)], Origin(), evict="a")
    assert [span.name for span in found] == ["queue", "generate"]
    assert found[1].parent is None and found[1].attributes["gen_ai.response.finish_reasons"] == ("abort",)


@pytest.mark.parametrize(
    ("timeline", "expected"),
    [
        (Timeline(1.0, None, None, None, 4.0), [("queue", 1.0, 4.0)]),
        (Timeline(1.0, 2.0, None, None, 4.0), [("queue", 1.0, 2.0), ("prefill", 2.0, 4.0)]),
        (Timeline(1.0, 2.0, 3.0, None, 5.0), [("queue", 1.0, 2.0), ("prefill", 2.0, 3.0), ("decode", 3.0, 5.0)]),
    ],
)
def test_phases_of_a_text_that_was_given_up(timeline: Timeline, expected: list[Any]) -> None:
    assert list(phases(timeline)) == expected


def test_without_a_collector_or_the_library_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in tracing._ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert type(spans_from_env("m")) is Observer
    monkeypatch.setenv(tracing._ENDPOINTS[0], "http://127.0.0.1:9")

    def missing() -> None:
        raise ModuleNotFoundError("no", name="opentelemetry")

    monkeypatch.setattr(tracing, "_make_provider", missing)
    assert type(spans_from_env("m")) is Observer
    assert "no traces: opentelemetry is not installed" in caplog.text


def test_a_collector_in_the_environment_switches_spans_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tracing._ENDPOINTS[0], "http://127.0.0.1:9")
    with caplog.at_level(logging.INFO):
        assert isinstance(spans_from_env("m"), Spans)
    assert "traces go to the OpenTelemetry collector" in caplog.text


class Headers:
    """What `row_origin` asks TorchServe's context for."""

    def __init__(self, **headers: Any) -> None:
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def get_all_request_header(self, index: int) -> dict[str, Any]:
        return self._headers


@pytest.mark.parametrize("sent", ["my-id", "A.b_c-9", "x" * 64])
def test_a_clients_id_stands_beside_torchserves(sent: str) -> None:
    origin = row_origin(Headers(**{"x-request-id": "server-id", "X-Request-Id": sent}), 0, "server-id", 2.0)
    assert (origin.arrived, origin.client_id, origin.name("server-id")) == (2.0, sent, f"server-id ({sent})")


@pytest.mark.parametrize("sent", ["", "x" * 65, "two words", "a\nb", "<script>", "ü", "a;b", None, 5])
def test_what_is_no_plain_word_is_dropped(sent: Any) -> None:
    origin = row_origin(Headers(**{"x-request-id": "server-id", "X-Request-Id": sent}), 0, "server-id", 2.0)
    assert origin.client_id is None and origin.name("server-id") == "server-id"
