"""Generated bodies: whatever is sent, the answer is a reply or a clear error, and streams beside it lose nothing.

`PROPERTY_EXAMPLES` sets how many bodies each endpoint gets (30 in `make test`). `PROPERTY_MODEL=tiny` serves a small
model of random weights with SmolLM2's tokenizer in its place: docs/reliability.md's longer run, thousands of bodies.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scripts import server
from scripts.package import Choice, package
from tests.e2e.conftest import Served, serve
from tests.e2e.strategies import BODIES

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "30"))
MODEL = os.environ.get("PROPERTY_MODEL", "")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CLEAR = {200, 400, 404, 413}


def make_tiny(smollm2: Path, folder: Path) -> Path:
    """A random Llama of two layers that takes SmolLM2's tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(smollm2, **TINY, num_key_value_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for item in smollm2.iterdir():
        if not (folder / item.name).exists() and item.suffix != ".safetensors":
            (folder / item.name).symlink_to(item)
    return folder


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that gets the bodies."""
    if MODEL != "tiny":
        yield request.getfixturevalue("fp32")
        return
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny(request.getfixturevalue("smollm2"), folder / "model")
    archive = package("smollm2", str(model), Choice(tp="2", device="cpu", dtype="fp32"), model_store=folder / "store")
    served = serve(folder / "run", "smollm2", archive)
    yield served
    assert server.stop(served.run) == 0


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
                pieces = [json.loads(event)["text"] for event in self._served.events(body)[:-1]]
                self.texts["".join(pieces)] += 1  # where they are cut is the clock's affair
            except Exception as error:
                self.texts[repr(error)] += 1

    def finish(self) -> Counter[str]:
        self._ended.set()
        self.join()
        return self.texts


@pytest.fixture(scope="module")
def statuses(target: Served) -> Iterator[Counter[int]]:
    """Counts of what came back; the witness streams all the time, and in the end nothing of it was lost."""
    witness, counts = Witness(target), Counter[int]()
    witness.start()
    yield counts
    assert len(witness.finish()) == 1, "a stream was lost or changed"
    log = target.worker_log()
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
def test_any_body_gets_a_clear_answer(path: str, target: Served, statuses: Counter[int]) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(BODIES[path])
    def send(body: Any) -> None:
        check(path, json.dumps(body).encode(), target, statuses)

    send()


def test_any_bytes_get_a_clear_answer(target: Served, statuses: Counter[int]) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(list(BODIES)), st.binary(max_size=40))
    def send(path: str, content: bytes) -> None:
        check(path, content, target, statuses)

    send()
    assert min(statuses[200], statuses[400]) > 0
