"""Generated bodies: whatever is sent, the answer is a reply or a clear error, and streams beside it lose nothing.

`PROPERTY_EXAMPLES` sets how many bodies each endpoint gets (60 in `make test`; README states a longer run).
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.e2e.conftest import Served
from tests.e2e.strategies import BODIES

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "60"))
CLEAR = {200, 400, 404, 413}


class Witness(threading.Thread):
    """Streams one text after another, each the same greedy one, and keeps those that differ."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served
        self._ended = threading.Event()
        self.texts: Counter[str] = Counter()

    def run(self) -> None:
        body = {"prompt": "One, two, three,", "max_new_tokens": 40}
        while not self._ended.is_set():
            try:
                self.texts["".join(self._served.events(body)[:-2])] += 1
            except Exception as error:
                self.texts[repr(error)] += 1

    def finish(self) -> Counter[str]:
        self._ended.set()
        self.join()
        return self.texts


@pytest.fixture(scope="module")
def statuses(fp32: Served) -> Iterator[Counter[int]]:
    """Counts of what came back; the witness streams all the time, and in the end nothing of it was lost."""
    witness, counts = Witness(fp32), Counter[int]()
    witness.start()
    yield counts
    assert len(witness.finish()) == 1, "a stream was lost or changed"
    log = fp32.worker_log()
    assert "ending the rank" not in log and log.count("ready after") == 2, "the worker was restarted"
    print(
        f"\n{sum(counts.values())} bodies: {dict(sorted(counts.items()))}, {sum(witness.texts.values())} streams beside"
    )


def check(path: str, content: bytes, served: Served, statuses: Counter[int]) -> None:
    response = httpx.post(served.url + path, content=content, headers={"content-type": "application/json"}, timeout=60)
    statuses[response.status_code] += 1
    assert response.status_code in CLEAR, (response.status_code, content)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
    else:
        assert "error" not in response.json()


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path or "plain")
def test_any_body_gets_a_clear_answer(path: str, fp32: Served, statuses: Counter[int]) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(BODIES[path])
    def send(body: Any) -> None:
        check(path, json.dumps(body).encode(), fp32, statuses)

    send()


def test_any_bytes_get_a_clear_answer(fp32: Served, statuses: Counter[int]) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(list(BODIES)), st.binary(max_size=40))
    def send(path: str, content: bytes) -> None:
        check(path, content, fp32, statuses)

    send()
    assert min(statuses[200], statuses[400]) > 0
