"""A real TorchServe with two torchrun ranks and the real SmolLM2, on ports and in folders of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import scripts.pack.archive
from scripts.pack.archive import Choice, package
from scripts.serve import server
from scripts.serve.run_dir import HOST, Ports, Record, RunDir

# What the small server runs and lets wait.
RUNNING, WAITING = 2, 3

# A word of the tiny model's tokenizer for which the model has no logit.
BEYOND = "<|beyond|>"
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

# ChatML with tools in the form of Hermes and Qwen.
TOOL_TEMPLATE = """{% if tools %}<|im_start|>system
Functions: {% for tool in tools %}{{ tool.function | tojson }} {% endfor %}
Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def free_ports() -> Ports:
    """Six ports in a row (the record's pattern) that nobody uses now."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            ports = Ports(probe.getsockname()[1])
        if ports.inference < 65000 and not ports.taken():
            return ports


@dataclass(frozen=True)
class Served:
    """One running model."""

    run: RunDir
    record: Record

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.record.port}/predictions/{self.record.name}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client gets as its base URL."""
        return f"{self.url}/1.0/v1"

    def ask(self, body: Any, timeout_s: float = 120) -> httpx.Response:
        """POSTs a JSON body."""
        return httpx.post(self.url, json=body, timeout=timeout_s)

    def text(self, body: Any) -> str:
        """The generated text of a request that must succeed."""
        response = self.ask(body)
        assert response.status_code == 200, response.text
        return response.json()["text"]

    def events(self, body: Any) -> list[str]:
        """The payloads of a stream's events, `[DONE]` included."""
        with httpx.stream("POST", self.url, json={**body, "stream": True}, timeout=120) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            raw = "".join(response.iter_text())
        assert raw.endswith("\n\n")
        blocks = raw[:-2].split("\n\n")
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        return [block.removeprefix("data: ") for block in blocks]

    def worker_log(self) -> str:
        return self.run.model_log.read_text(encoding="utf-8")


def serve(folder: Path, name: str, archive: Path, host: str = HOST) -> Served:
    """Starts a server and waits until it is ready; stops it again where it never is."""
    run = RunDir(folder)
    record = server.start(run, name, archive, free_ports(), host)
    try:
        server.wait_until_ready(run, record, lambda _: None)
    except BaseException:
        server.stop(run)
        raise
    return Served(run, record)


def package_with(
    folder: Path, name: str, model: Path, choice: Choice, deepspeed: dict[str, Any] | None = None, **handler: Any
) -> Path:
    """An archive of a configuration of its own: the template with these keys of `handler:`, rows enough for them, and
    these keys of ds-config.json."""
    own = folder / "configs" / name
    own.mkdir(parents=True)
    template = scripts.pack.archive.CONFIGS / "smollm2"
    settings = yaml.safe_load((template / "model-config.yaml").read_text())
    settings["handler"] |= handler
    for key in scripts.pack.archive.ROOM_KEYS:
        del settings[key]  # they follow from what the handler holds
    (own / "model-config.yaml").write_text(yaml.safe_dump(settings))
    ds_config = json.loads((template / "ds-config.json").read_text()) | (deepspeed or {})
    (own / "ds-config.json").write_text(json.dumps(ds_config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.pack.archive, "CONFIGS", folder / "configs")
        return package(name, str(model), choice, model_store=folder / "store")


@pytest.fixture(scope="session")
def fp32(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """SmolLM2 in fp32 over two ranks, as `make deploy DTYPE=fp32` serves it."""
    folder = tmp_path_factory.mktemp("fp32")
    archive = package("smollm2", str(smollm2), Choice(tp="2", device="cpu", dtype="fp32"), model_store=folder / "store")
    served = serve(folder / "run", "smollm2", archive)
    yield served
    killed = server.stop(served.run)
    assert killed == 0, "processes had to be killed at the end"


def parse(events: list[str]) -> list[dict[str, Any]]:
    """The JSON events before `[DONE]`."""
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.fixture(scope="session")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One rank, two rows, room for three to wait, and a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("small")
    model = folder / "model"
    model.mkdir()
    for item in smollm2.iterdir():
        if item.name != "chat_template.jinja":
            (model / item.name).symlink_to(item)
    (model / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    limits = {"max_running": RUNNING, "max_waiting": WAITING, "max_model_len": 2048}
    archive = package_with(folder, "small", model, Choice(tp="1", device="cpu", dtype="bf16"), **limits)
    served = serve(folder / "run", "small", archive)
    yield served
    assert server.stop(served.run) == 0, "processes had to be killed at the end"


def make_tiny(smollm2: Path, folder: Path) -> Path:
    """A random Llama of two layers that takes SmolLM2's tokens, whose template knows tools and whose tokenizer has one
    token more than the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(smollm2, **_TINY, num_key_value_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.add_tokens([BEYOND]) == 1 and len(tokenizer) > config.vocab_size
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text((smollm2 / "generation_config.json").read_text())
    return folder


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny random model over two ranks with the default limits: thousands of bodies in minutes."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny(smollm2, folder / "model")
    archive = package("tiny", str(model), Choice(tp="2", device="cpu", dtype="fp32"), model_store=folder / "store")
    served = serve(folder / "run", "tiny", archive)
    yield served
    assert server.stop(served.run) == 0, "processes had to be killed at the end"


class Witness(threading.Thread):
    """Streams one text after another, each the same greedy one, and keeps those that differ."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served
        self._ended = threading.Event()
        self._starts = served.worker_log().count("ready after")
        self.texts: Counter[str] = Counter()
        self.longest_gap_s = 0.0  # between two pieces of a text

    def run(self) -> None:
        body = {"prompt": "One, two, three,", "max_new_tokens": 40}
        while not self._ended.is_set():
            try:
                self.texts[self._read(body)] += 1
            except Exception as error:
                self.texts[repr(error)] += 1

    def _read(self, body: dict[str, Any]) -> str:
        """One whole text; where it is cut is the clock's affair."""
        pieces, last = [], 0.0
        with httpx.stream("POST", self._served.url, json={**body, "stream": True}, timeout=120) as response:
            assert response.status_code == 200, response.status_code
            for line in response.iter_lines():
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - last if last else 0.0)
                last = now
                pieces.append(line)
        assert pieces[-2:] == ["data: [DONE]", ""], pieces[-2:]
        return "".join(json.loads(piece[6:])["text"] for piece in pieces[:-2] if piece)

    def finish(self) -> None:
        """Waits for the end of the last text.

        Raises:
            AssertionError: a text was lost or changed, or the worker is not the one it was.
        """
        self._ended.set()
        self.join()
        assert len(self.texts) == 1, f"a stream was lost or changed: {self.texts}"
        log = self._served.worker_log()
        assert "ending the rank" not in log and log.count("ready after") == self._starts, "the worker was restarted"


@pytest.fixture(scope="module")
def beside(tiny: Served) -> Iterator[Witness]:
    """A client that streams from the tiny model all the time; in the end nothing of it was lost."""
    witness = Witness(tiny)
    witness.start()
    yield witness
    witness.finish()
