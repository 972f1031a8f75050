"""A TorchServe row to a path and a body: a plain prompt or a JSON object. Does not look into the object (`schema`)."""

from __future__ import annotations

import json
import re
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.core.request import Origin

_BODY_KEYS = ("body", "data")
_NO_TYPE = (None, "application/octet-stream")  # the second is what TorchServe writes for the first
_HINT = "send it with -H 'Content-Type: application/json' and a JSON object, or with text/plain and the prompt"

# A client's header reaches the handler in whatever case it was sent; TorchServe's own id may stand beside it.
_CLIENT_ID_HEADER = "x-request-id"
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACE_HEADER = "traceparent"


def row_origin(ctx: Any, index: int, request_id: str, arrived: float) -> Origin:
    """Where a request comes from, as far as its headers say it; an id that is no plain word is dropped."""
    client_id = traceparent = None
    for name, value in ctx.get_all_request_header(index).items():
        if not isinstance(value, str):
            continue
        if name.lower() == _CLIENT_ID_HEADER and value != request_id and _CLIENT_ID.fullmatch(value):
            client_id = value
        elif name.lower() == _TRACE_HEADER:
            traceparent = value
    return Origin(arrived, client_id=client_id, traceparent=traceparent)


def row_path(ctx: Any, index: int) -> str:
    """What follows the model's version in the request's path, without slashes around it; empty for nothing."""
    return (ctx.get_request_header(index, "url_path") or "").strip("/")


def row_content_type(ctx: Any, index: int, row: dict[str, Any]) -> str | None:
    """The media type of a row's body, lower case, without parameters; None where the client named none."""
    for key in _BODY_KEYS:
        if key in row:
            header = ctx.get_request_header(index, key)
            content_type = header.get("content-type") if isinstance(header, dict) else None
            return (content_type or "").partition(";")[0].strip().lower() or None
    return None


def read_body(row: dict[str, Any], content_type: str | None) -> str | dict[str, Any]:
    """The body of a request's first row: `str` is a plain prompt, `dict` a JSON object.

    Raises:
        RequestError: 400; the message never holds the body's text.
    """
    keys = [key for key in _BODY_KEYS if key in row]
    if not keys:
        # `curl -d` without a content type is a form to TorchServe: its text arrives as names of parameters.
        raise RequestError(f"no request body: {_HINT}")
    if len(row) > 1:
        raise RequestError("parameters in the URL or in a form are not read: put them into the JSON body")
    value = row[keys[0]]
    is_json = content_type is not None and (content_type == "application/json" or content_type.endswith("+json"))
    if isinstance(value, (bytes, bytearray)):
        text = _decode(bytes(value))
        if content_type in _NO_TYPE and _is_json_object(text):
            raise RequestError(f"the body is a JSON object without a content type: {_HINT}")
        value = _parse(text) if is_json else text
    if isinstance(value, dict):
        return value
    if is_json or not isinstance(value, str):
        raise RequestError(f'the JSON body must be an object like {{"prompt": "..."}}, found {_json_name(value)}')
    if not value:
        raise RequestError(f"the request body is empty: {_HINT}")
    return value


def _decode(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the request body is not UTF-8 (byte {error.start}): encode it as UTF-8") from None


def _parse(text: str) -> Any:
    if not text:
        raise RequestError(f"the request body is empty: {_HINT}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the request body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:  # Python's limit of digits
        raise RequestError("the request body holds a number of thousands of digits") from None
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None


def _is_json_object(text: str) -> bool:
    """Whether somebody who meant JSON would be answered as if it were a prompt."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _json_name(value: Any) -> str:
    names = {str: "a string", list: "an array", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
