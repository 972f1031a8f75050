"""Paths to endpoints. TorchServe hands on what follows `/predictions/<model>/<version>/` as the header `url_path`.

The HTTP method does not reach a handler, so a path alone decides; a POST path without a body is a 400.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.protocol.bounds import VALUES
from dsserve.protocol.job import Job
from dsserve.protocol.json_bounds import check_body
from dsserve.protocol.openai.endpoints import chat, complete, list_models
from dsserve.protocol.openai.openapi import describe
from dsserve.protocol.openai.tokenizer_endpoints import detokenize, tokenize
from dsserve.protocol.plain_endpoint import generate
from dsserve.protocol.reply import to_json
from dsserve.protocol.rows import read_body
from dsserve.protocol.served import ServedModel

_OFFERED: dict[str, Callable[[ServedModel], bytes]] = {
    "v1/models": list_models,
    "v1/openapi.json": lambda served: to_json(describe()),
    "health": lambda served: to_json({"status": "ok"}),  # load tools ask for it first
}
_POSTED: dict[str, Callable[[str, Any, ServedModel], Job | bytes]] = {
    "v1/completions": complete,
    "v1/chat/completions": chat,
    "v1/tokenize": tokenize,
    "v1/detokenize": detokenize,
}
# The plain endpoint's path is empty.
PATHS = ("", *_POSTED, *_OFFERED)


def answer(
    path: str, request_id: str, row: dict[str, Any], content_type: str | None, served: ServedModel
) -> Job | bytes:
    """The job of a request, or its whole answer in JSON.

    Args:
        path: what follows the model's version, without slashes around it; empty = the plain endpoint.

    Raises:
        RequestError: the request cannot be answered; under `v1/` with OpenAI's statuses and codes.
    """
    if path == "":
        return generate(request_id, _read(row, content_type, served), served)
    if path in _OFFERED:
        return _OFFERED[path](served)
    if path not in _POSTED:
        raise RequestError(f"no such path; there are {', '.join(PATHS[1:])}", status=404, code="unknown_url")
    try:
        body = _read(row, content_type, served)
        if isinstance(body, str):
            raise RequestError("send a JSON object with -H 'Content-Type: application/json'")
        return _POSTED[path](request_id, body, served)
    except RequestError as error:
        if error.status == 413:  # OpenAI's clients know a prompt that is too long by its code
            raise RequestError(error.message, param=error.param, code="context_length_exceeded") from None
        raise


def _read(row: dict[str, Any], content_type: str | None, served: ServedModel) -> str | dict[str, Any]:
    """A plain prompt, or a JSON object within the bounds of any."""
    body = read_body(row, content_type)
    if not isinstance(body, str):
        check_body(body, max(VALUES.most, 2 * served.limits.max_model_len))
    return body
