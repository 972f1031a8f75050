"""Rank 0's side of a worker without TorchServe's frontend and without a model, for tests of what it answers."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from ts.context import RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response

from dsserve.core.request import GenerationRequest, Limits, TokenEvent
from dsserve.protocol.served import ServedModel
from dsserve.sampling.grammar import GrammarCompiler
from dsserve.worker.call_length import CallLength
from dsserve.worker.live_batch import LiveBatch
from tests.support.contexts import make_context


class FakeEngine:
    """Writes down what it is asked, and says what the test tells it to say."""

    def __init__(self) -> None:
        self.admitted: list[GenerationRequest] = []
        self.evicted: list[str] = []
        self.script: list[list[TokenEvent]] = []
        self.calls = 0
        self.limits_s: list[float] = []
        self.running = 0
        self.waiting = 0

    def admit(self, request: GenerationRequest, origin: Any = None) -> None:
        self.admitted.append(request)

    def evict(self, request_id: str) -> None:
        self.evicted.append(request_id)

    def run(self, max_steps: int, limit_s: float) -> list[TokenEvent]:
        self.limits_s.append(limit_s)
        self.calls += 1
        return self.script.pop(0) if self.script else []


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def served_model(tokenizer: Any, limits: Limits) -> ServedModel:
    return ServedModel("test", tokenizer, limits, 100, GrammarCompiler(tokenizer, 100, frozenset({2})))


class Worker:
    """What TorchServe's `Service.predict` does around the handler, for rank 0."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.draining = False
        self.served = served_model(make_tokenizer(), Limits(64, 16, 32, max_running=2, max_waiting=2))
        self.batch = LiveBatch(
            self.engine,  # type: ignore[arg-type]
            self.served,
            max_steps=4,
            call_length=CallLength(0.15),
            is_draining=lambda: self.draining,
        )
        self.ctx = make_context(".", {})

    def call(
        self, rows: dict[str, dict[str, Any]], events: list[TokenEvent] | None = None, path: str = ""
    ) -> dict[str, Any]:
        """One call with these rows; returns for each id (bytes, status, content type, ts_stream_next)."""
        self.engine.script = [events or []]
        self.ctx.request_ids = dict(enumerate(rows))
        self.ctx.stopping_criteria = None
        self.ctx.request_processor = [
            RequestProcessor({"body": {"content-type": "application/json"}, "url_path": path} if row else {})
            for row in rows.values()
        ]
        items = self.batch.serve(list(rows.values()), self.ctx)
        assert len(items) == len(rows)
        create_predict_response(items, self.ctx.request_ids, "Prediction success", 200, self.ctx)
        return {
            name: (
                bytes(items[index]),
                self.ctx.get_response_status(index)[0],
                self.ctx.get_response_content_type(index),
                self.ctx.get_response_headers(index).get("ts_stream_next"),
            )
            for index, name in enumerate(rows)
        }


def body(**parameters: Any) -> dict[str, Any]:
    return {"body": {"prompt": "hello world", **parameters}}


def done(name: str, text: str = "", reason: Any = "stop") -> TokenEvent:
    return TokenEvent(name, text, 0, reason, completion_tokens=3, prompt_tokens=2)
