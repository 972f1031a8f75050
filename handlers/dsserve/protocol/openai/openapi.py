"""The OpenAPI description of the endpoints, from the bodies that are really parsed. Served at `v1/openapi.json`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dsserve.protocol.openai.schema import ChatBody, CompletionBody
from dsserve.protocol.openai.tokenizer_endpoints import DetokenizeBody, TokenizeBody
from dsserve.protocol.schema import GenerateBody

_POSTED: dict[str, tuple[type[BaseModel], str, bool]] = {  # path -> body, what it does, may it stream
    "": (GenerateBody, "Generate text, the plain way", True),
    "/1.0/v1/completions": (CompletionBody, "Continue prompts", True),
    "/1.0/v1/chat/completions": (ChatBody, "Answer a conversation", True),
    "/1.0/v1/tokenize": (TokenizeBody, "Text or messages to token ids", False),
    "/1.0/v1/detokenize": (DetokenizeBody, "Token ids to text", False),
}
_STATUSES = {
    "400": "the request cannot be understood or does not fit",
    "404": "no such model or path",
    "413": "plain endpoint: the prompt does not fit the context",
    "429": "max_waiting sequences wait already, or reading requests takes too long",
    "500": "this request failed",
    "503": "the server drains, its queue is full, or the worker is being restarted",
    "504": "the request did not end in its time",
    "507": "the device has no memory for this prompt",
}


def describe() -> dict[str, Any]:
    """The whole document. Paths are below `/predictions/<model>`, for version 1.0 of a model."""
    bodies = [(body, "validation") for body, _, _ in _POSTED.values()]
    _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {
        path or "/": {"post": _operation(body, summary, streams)} for path, (body, summary, streams) in _POSTED.items()
    }
    paths["/1.0/v1/models"] = {"get": {"summary": "The model behind this path", "responses": _responses(False)}}
    paths["/1.0/health"] = {"get": {"summary": "Whether the handler answers", "responses": _responses(False)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "DeepSpeed handlers for TorchServe", "version": "1"},
        "servers": [{"url": "http://127.0.0.1:8080/predictions/smollm2"}],
        "paths": paths,
        "components": {"schemas": {**definitions["$defs"], "Error": _ERROR}},
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _operation(body: type[BaseModel], summary: str, streams: bool) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": _responses(streams)}


def _responses(streams: bool) -> dict[str, Any]:
    kinds = ["application/json", "text/event-stream"] if streams else ["application/json"]
    good = {"description": "the answer", "content": {kind: {} for kind in kinds}}
    bad = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {status: {"description": text, "content": bad} for status, text in _STATUSES.items()}
    return {"200": good, **errors}
