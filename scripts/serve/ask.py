"""Ask the served model one question and print its answer, and the curl line that asks it again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import typer

from scripts.common.addresses import AddressError
from scripts.common.console import fail, say
from scripts.common.paths import DEMO_MODEL
from scripts.common.web import OK, Unreachable, request_json
from scripts.serve.find_run import find_target
from scripts.serve.run_dir import HOST

QUESTION = "What is the capital of Japan?"
TIMEOUT_S = 120.0
BAD_REQUEST = 400


class AskError(Exception):
    """No answer; the message says why."""


def ask(url: str, question: str, max_new_tokens: int, token: str | None = None) -> tuple[str, dict[str, Any]]:
    """The answer, and the JSON body that brought it: a chat message, or a plain prompt for a model without chat
    template. Raises AskError."""
    message = {"role": "user", "content": question}
    body: dict[str, Any] = {"messages": [message], "max_new_tokens": max_new_tokens}
    status, reply = post(url, body, token)
    if status == BAD_REQUEST and error_of(reply).get("param") == "messages":
        body = {"prompt": question, "max_new_tokens": max_new_tokens}
        status, reply = post(url, body, token)
    if status != OK or not isinstance(reply, dict) or "text" not in reply:
        raise AskError(f"status {status}: {error_of(reply).get('message') or reply}")
    return str(reply["text"]), body


def post(url: str, body: dict[str, Any], token: str | None = None) -> tuple[int, Any]:
    try:
        return request_json(url, body, TIMEOUT_S, token)
    except Unreachable as error:
        raise AskError(
            f"no reply from {url} ({error}): start the server with `make deploy`, or see `make logs`"
        ) from None


def error_of(reply: Any) -> dict[str, Any]:
    """The handler's error object, or what TorchServe itself replies; empty for a reply that is neither."""
    if not isinstance(reply, dict):
        return {}
    error = reply.get("error", reply)
    return error if isinstance(error, dict) else {}


def curl_line(url: str, body: dict[str, Any]) -> str:
    """A shell line that sends the same request."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl {shlex.quote(url)} -H 'Content-Type: application/json' -d {data}"


def main(
    question: str = typer.Argument(QUESTION),
    name: str = typer.Option(DEMO_MODEL, help="name of the served model"),
    port: int = typer.Option(8080, help="inference port"),
    max_new_tokens: int = typer.Option(128, help="longest answer, in tokens"),
    host: str = typer.Option(HOST, help="address that inference is bound to, where no record says it"),
    run_dir: Path = typer.Option(None, help="folder of the server: its record says address and tokens"),
    key_file: Path = typer.Option(None, help="TorchServe's key_file.json, where it asks for tokens"),
) -> None:
    """Ask one question."""
    try:
        target = find_target(name, port, run_dir, host, key_file)
        token = target.token("inference")
        answer, body = ask(target.url, question, max_new_tokens, token)
    except (AddressError, AskError) as error:
        fail(str(error))
    say(f"\nquestion: {question}")
    typer.echo(answer)
    say(
        f"\nask again:\n  {curl_line(target.url, body)}"
        + (' -H "Authorization: Bearer $(make -s token)"' if token else "")
    )


if __name__ == "__main__":
    typer.run(main)
