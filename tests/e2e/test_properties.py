"""Generated bodies: whatever is sent, the answer is a reply or a clear error, and streams beside it lose nothing.

A tiny model of random weights with SmolLM2's tokenizer and a template that knows tools. `PROPERTY_EXAMPLES` sets how
many bodies each endpoint gets (30 in `make test`); `make test-long` sends 10,000 (`PROPERTY_LONG`) and prints what came
back.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.e2e.conftest import Served, Witness
from tests.e2e.strategies import BODIES, BYTES, TYPES

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "30"))
LONG_EXAMPLES = int(os.environ.get("PROPERTY_LONG", "10000"))
CLEAR = {200, 400, 404, 413, 429}
AT_ONCE = 4
MOST_BYTES = 2**20  # what `scripts.pack.request_size` gives a context of 8192 tokens


def check(path: str, content: bytes, served: Served, content_type: str = "application/json") -> int:
    """Sends a body, checks that its answer is a whole one or a clear error, and returns the status."""
    headers = {"content-type": content_type} if content_type else {}
    response = httpx.post(served.url + path, content=content, headers=headers, timeout=120)
    shown = (response.status_code, response.content[:500], path, content_type, len(content), content[:2000])
    if b"ErrorDataDecoderException" in response.content:  # TorchServe's own answer to a form that it cannot read
        assert response.status_code == 500 and content_type == "application/x-www-form-urlencoded", shown
        return response.status_code
    assert response.status_code in CLEAR, shown
    if len(content) > MOST_BYTES:  # TorchServe's own answer, which has no body
        assert response.status_code == 413, shown
    elif response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], shown
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text, shown
    elif response.headers["content-type"].startswith("application/json"):
        assert "error" not in response.json(), shown
    return response.status_code


def send(path: str, examples: int, served: Served) -> Counter[int]:
    """Sends generated bodies to an endpoint; counts what came back."""
    counts = Counter[int]()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(BODIES[path])
    def each(body: Any) -> None:
        counts[check(path, json.dumps(body).encode(), served)] += 1

    each()
    return counts


def send_bytes(examples: int, served: Served) -> Counter[int]:
    """Sends bytes that may be no JSON to all endpoints, with many content types."""
    counts = Counter[int]()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.sampled_from(list(BODIES)), BYTES, st.sampled_from(TYPES))
    def each(path: str, content: bytes, content_type: str) -> None:
        counts[check(path, content, served, content_type)] += 1

    each()
    return counts


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path or "plain")
def test_any_body_gets_a_clear_answer(path: str, tiny: Served, beside: Witness) -> None:
    counts = send(path, EXAMPLES, tiny)
    assert min(counts[200], counts[400]) > 0


def test_any_bytes_get_a_clear_answer(tiny: Served, beside: Witness) -> None:
    assert send_bytes(EXAMPLES, tiny)[400] > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_bodies(tiny: Served, beside: Witness) -> None:
    """Several clients at a time; prints the counts of each endpoint."""
    each = -(-LONG_EXAMPLES // (len(BODIES) + 1))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sent = {path or "plain": pool.submit(send, path, each, tiny) for path in BODIES}
        sent["bytes"] = pool.submit(send_bytes, each, tiny)
        found = {name: task.result() for name, task in sent.items()}
    total = sum(found.values(), Counter[int]())
    for name, counts in {**found, "all": total}.items():
        print(f"{name}: {sum(counts.values())} bodies, {dict(sorted(counts.items()))}")
    texts = sum(beside.texts.values())
    print(f"{texts} streams beside them, the longest wait between two pieces {beside.longest_gap_s:.2f} s")
    assert total.total() >= LONG_EXAMPLES * 0.9  # an endpoint may have fewer different bodies
