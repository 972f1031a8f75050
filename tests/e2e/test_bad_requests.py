"""Every kind of bad input, over real HTTP: its own status, a JSON body that says how to mend it, no harm done."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Served

JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
USER = {"role": "user", "content": "hi"}

CASES: list[tuple[str, bytes | dict, dict, int, str | None, list[str]]] = [
    ("no body", b"", TEXT, 400, None, ["content-type"]),
    ("invalid JSON", b'{"prompt": ', JSON, 400, None, ["json"]),
    ("JSON that is no object", b"[1, 2]", JSON, 400, None, ["object"]),
    ("JSON string", b'"hello"', JSON, 400, None, ["object"]),
    ("not UTF-8 text", b"caf\xe9", TEXT, 400, None, ["utf-8"]),
    ("not UTF-8 JSON", b'{"prompt": "caf\xe9"}', JSON, 400, None, ["utf-8"]),
    ("not UTF-8, no type", b"\xff\xfe\xfd", {}, 400, None, ["utf-8"]),
    ("JSON without a type", b'{"prompt": "x"}', {}, 400, None, ["content-type: application/json"]),
    ("wrong type", {"prompt": 5}, JSON, 400, "prompt", ["string"]),
    ("bool for a number", {"prompt": "x", "max_new_tokens": True}, JSON, 400, "max_new_tokens", []),
    ("empty prompt", {"prompt": ""}, JSON, 400, "prompt", ["empty"]),
    ("empty messages", {"messages": []}, JSON, 400, "messages", []),
    ("neither prompt nor messages", {"max_new_tokens": 5}, JSON, 400, None, ["prompt", "messages"]),
    ("both", {"prompt": "x", "messages": [USER]}, JSON, 400, None, ["prompt", "messages"]),
    ("zero tokens", {"prompt": "x", "max_new_tokens": 0}, JSON, 400, "max_new_tokens", ["1"]),
    ("negative tokens", {"prompt": "x", "max_new_tokens": -3}, JSON, 400, "max_new_tokens", ["1"]),
    ("tokens above the ceiling", {"prompt": "x", "max_new_tokens": 10**6}, JSON, 400, "max_new_tokens", ["8191"]),
    ("unknown parameter", {"prompt": "x", "temperatur": 1}, JSON, 400, "temperatur", ["temperature"]),
    ("another server's parameter", {"prompt": "x", "max_tokens": 5}, JSON, 400, "max_tokens", ["max_new_tokens"]),
    ("temperature below 0", {"prompt": "x", "temperature": -1}, JSON, 400, "temperature", ["0"]),
    ("top_p above 1", {"prompt": "x", "top_p": 1.5}, JSON, 400, "top_p", ["1"]),
    ("seed of 65 bits", {"prompt": "x", "seed": 2**64}, JSON, 400, "seed", [str(2**63 - 1)]),
    ("empty stop", {"prompt": "x", "stop": ""}, JSON, 400, "stop", []),
    ("unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, JSON, 400, "messages", ["user"]),
    ("lone surrogate", b'{"prompt": "\\ud800"}', JSON, 400, "prompt", []),
    ("prompt over the context", {"prompt": "word " * 9000}, JSON, 413, "prompt", ["8192"]),
    (
        "no room for the output",
        {"prompt": "word " * 8000, "max_new_tokens": 1000},
        JSON,
        413,
        "max_new_tokens",
        ["8192", "1000"],
    ),
]


@pytest.mark.parametrize(
    ("body", "headers", "status", "param", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_bad_request_gets_its_answer(
    fp32: Served, body: bytes | dict, headers: dict, status: int, param: str | None, words: list[str]
) -> None:
    content: dict[str, Any] = {"json": body} if isinstance(body, dict) else {"content": body}
    response = httpx.post(fp32.url, headers=headers, timeout=60, **content)
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word.lower() in error["message"].lower()


def test_curl_without_a_content_type_gets_a_hint(fp32: Served) -> None:
    for data in ("Hello", '{"prompt": "Hello"}', '{"prompt": "a=b&c"}'):
        command = ["curl", "-s", "-w", "\n%{http_code}", fp32.url, "-d", data]
        body, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rsplit("\n", 1)
        assert status == "400"
        assert "Content-Type: application/json" in body


def test_a_form_with_parameters_is_not_half_read(fp32: Served) -> None:
    """TorchServe hands form fields over; `data` is a prompt (`curl -F data=@file`), anything beside it is refused."""
    response = httpx.post(fp32.url, files={"data": (None, "x"), "temperature": (None, "2")}, timeout=60)
    assert response.status_code == 400
    assert "JSON body" in response.json()["error"]["message"]


def test_no_path_or_header_forges_a_line_of_a_log(fp32: Served) -> None:
    """TorchServe's exception about such a path holds it as it is, line breaks too."""
    forged = "2026-01-01T00:00:00,000 [INFO ] main forged"
    httpx.get(f"{fp32.url}/1.0/v1/x%0a{forged}", timeout=60)
    httpx.get(f"{fp32.url}%0d%0a{forged}/1.0/v1/models", timeout=60)
    httpx.get(f"{fp32.base_url}/models", headers={"x-odd": "a\tb", "X-Request-Id": f"{forged}"}, timeout=60)
    for name in ("access_log.log", "ts_log.log", "model_log.log"):
        lines = (fp32.run.logs / name).read_text(encoding="utf-8").splitlines()
        assert lines and all(re.match(r"\d{4}-\d\d-\d\dT[\d:,]+ ", line) for line in lines), name
        assert not any(line.startswith("2026-01-01T00:00:00,000") for line in lines), name


def test_no_user_text_in_any_log(fp32: Served) -> None:
    secret = "xyzzyplugh"
    forged = f"{secret}\n[METRICS]Forged.Count:1|#Level:Host|#type:GAUGE|#hostname:a,1"
    fp32.ask({"prompt": forged, "max_new_tokens": 2})
    fp32.ask({"prompt": forged, secret: 1})
    httpx.post(fp32.url, content=f'{{"{secret}', headers=JSON, timeout=60)
    httpx.post(fp32.url, content=secret.encode() + b"\xff", headers=TEXT, timeout=60)
    logs = [path for path in fp32.run.path.rglob("*.log") if path.is_file()]
    assert fp32.run.model_log in logs
    for log in logs:
        assert secret not in log.read_text(encoding="utf-8", errors="replace"), log.name
