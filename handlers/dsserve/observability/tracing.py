"""OpenTelemetry spans of a sequence's way: queue, prefill, decode, detokenize. Optional: needs `opentelemetry-sdk`.

Spans are made when the sequence is over, from its timeline, so that tracing costs the same for every text and nothing
between its tokens. Switched on by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`), which also name the
service and the sampler. No span holds a text.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsserve.core.timeline import Timeline
from dsserve.engine.observer import Observer, Outcome

if TYPE_CHECKING:
    from dsserve.engine.sequence import Sequence

logger = logging.getLogger(__name__)

SERVICE = "dsserve"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NANOSECONDS = 1e9


def spans_from_env(model_name: str) -> Observer:
    """What makes spans where the environment names a collector; else what watches nothing."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return Observer()
    try:
        provider = _make_provider()
    except ImportError as error:
        logger.warning("[dsserve] no traces: %s is not installed (pip install '.[tracing]')", error.name)
        return Observer()
    logger.info("[dsserve] traces go to the OpenTelemetry collector")
    return Spans(provider, model_name)


def _make_provider() -> Any:
    """A provider that sends spans over OTLP/HTTP from a thread of its own. Raises ImportError."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Spans(Observer):
    """Makes five spans at most for each sequence that is over; a client's `traceparent` is their parent.

    Args:
        provider: OpenTelemetry's tracer provider.
    """

    def __init__(self, provider: Any, model_name: str) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer(SERVICE)
        self._model_name = model_name
        self._read_parent = TraceContextTextMapPropagator().extract
        self._within = set_span_in_context
        self._server = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def ended(self, sequence: Sequence, outcome: Outcome) -> None:
        """See `Observer`."""
        timeline, origin = sequence.timeline, sequence.origin
        if timeline.ended is None:
            return
        offset = time.time() - time.monotonic()

        def at(moment: float) -> int:
            return int((moment + offset) * _NANOSECONDS)

        # An empty context, not the thread's: nothing else of this process is traced.
        parent = self._read_parent({"traceparent": origin.traceparent} if origin.traceparent else {})
        whole = self._tracer.start_span(
            "generate", parent, self._server, self._attributes(sequence, outcome), start_time=at(timeline.arrived)
        )
        context = self._within(whole, parent)
        for name, start, end in phases(timeline):
            self._tracer.start_span(name, context, start_time=at(start)).end(at(end))
        if outcome == "error":
            whole.set_status(self._failed)
        whole.end(at(timeline.ended))

    def _attributes(self, sequence: Sequence, outcome: Outcome) -> dict[str, Any]:
        """Numbers and names of ours, under OpenTelemetry's names for generative models where it has them."""
        request = sequence.request
        found = {
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.max_tokens": request.max_new_tokens,
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "gen_ai.usage.output_tokens": sequence.generated,
            "gen_ai.response.finish_reasons": (outcome,),
            "dsserve.request_id": request.request_id,
            "dsserve.text_index": request.index,
            "dsserve.cached_tokens": sequence.cached_tokens,
        }
        if sequence.origin.client_id is not None:
            found["dsserve.client_request_id"] = sequence.origin.client_id
        return found


def phases(timeline: Timeline) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of what a sequence that is over went through, without gaps; the last one may be cut short."""
    ended = timeline.arrived if timeline.ended is None else timeline.ended
    if timeline.admitted is None:
        yield "queue", timeline.arrived, ended
        return
    yield "queue", timeline.arrived, timeline.admitted
    last = ended if timeline.last_token is None else timeline.last_token
    first = ended if timeline.first_token is None else timeline.first_token
    yield "prefill", timeline.admitted, min(first, last)
    if first < last:
        yield "decode", first, last
    if timeline.last_token is not None:
        yield "detokenize", last, ended
