"""JSON over HTTP to a server on this machine, with the standard library alone and past any proxy."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

OK = 200


class Unreachable(Exception):
    """No reply: nobody listens there, the connection broke, or the time is over."""


def request_json(
    url: str, body: Any = None, timeout_s: float = 5.0, token: str | None = None, method: str | None = None
) -> tuple[int, Any]:
    """GET, or POST if there is a body. Returns the status and the reply: parsed JSON, or text where it is none.

    `token` goes out as `Authorization: Bearer`.

    Raises Unreachable.
    """
    data = None if body is None else json.dumps(body).encode()
    # TorchServe takes a POST of that type for a JSON body, and fails where there is none.
    headers = {"Content-Type": "application/json"} if data is not None else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as reply:
            return reply.status, parse(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, parse(error.read())
    except (OSError, HTTPException) as error:
        raise Unreachable(str(getattr(error, "reason", error)) or type(error).__name__) from None


def parse(reply: bytes) -> Any:
    """JSON as Python objects, anything else as text."""
    text = reply.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text
