"""The same model through HTTP: TorchServe started by the benchmark, streaming clients at once, times and rates."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts.bench.client import run_round
from scripts.bench.http import free_ports
from scripts.bench.report import http_numbers
from scripts.common.paths import ROOT
from scripts.model.random import as_text, draw_prompts
from scripts.pack.archive import Choice, package
from scripts.serve import server
from scripts.serve.run_dir import HOST, RunDir

NAME = "bench-gpu"
READY_S = 450.0
# Rounds of short requests before all others: Java compiles what has run some hundred times, until then each request
# takes the frontend a multiple of its time.
WARM_UPS, WARM_UP_TOKENS = 10, 4


@contextlib.contextmanager
def served(model: Path, choice: Choice, handler: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Serves the model while the block runs; yields its URL and the seconds from start to ready.

    Raises ServerError, PackageError, MachineError, BenchError.
    """
    ports = free_ports()
    run = RunDir(ROOT / "run" / f"{NAME}-{ports.inference}")
    with tempfile.TemporaryDirectory(prefix="dsserve-bench-") as folder:
        archive = package(NAME, str(model), choice, model_store=Path(folder), handler=handler)
        started = time.monotonic()
        try:
            record = server.start(run, NAME, archive, ports)
            server.wait_until_ready(run, record, on_stage=lambda stage: None, timeout_s=READY_S)
            yield f"http://{HOST}:{ports.inference}/predictions/{NAME}", time.monotonic() - started
        finally:
            server.stop(run)


def measure_http(
    model: Path, choice: Choice, vocabulary: int, prompt: int, batches: list[int], new_tokens: int, repeats: int,
    deadline: float,
) -> dict[str, Any]:  # fmt: skip
    """Rounds of each number of streaming clients until `deadline` (monotonic clock), each after one that is not counted
    and all after `WARM_UPS`.

    Raises ServerError, PackageError, MachineError, BenchError.
    """
    handler = {
        "max_running": max(2, *batches), "max_waiting": 8, "max_model_len": prompt + new_tokens,
        "max_new_tokens": new_tokens, "enable_prefix_caching": False,
    }  # fmt: skip
    cases: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with served(model, choice, handler) as (url, ready_s):
        address = urlsplit(url)
        host, port = address.hostname or HOST, address.port or 80
        for seed in range(WARM_UPS):
            shorts = [as_text(ids) for ids in draw_prompts(vocabulary, WARM_UP_TOKENS, max(batches), seed)]
            run_round(host, port, address.path, shorts, WARM_UP_TOKENS)
        for batch in batches:
            if time.monotonic() > deadline:
                skipped[str(batch)] = "no time was left for it"
                continue
            rounds = []
            for seed in range(repeats + 1):
                texts = [as_text(ids) for ids in draw_prompts(vocabulary, prompt, batch, seed)]
                rounds.append(run_round(host, port, address.path, texts, new_tokens))
            numbers = http_numbers({str(batch): rounds[1:]})[str(batch)]
            cases[str(batch)] = {
                "step_ms": numbers["inter_token_ms_median"],
                "inter_token_ms_p95": numbers["inter_token_ms_p95"],
                "first_token_ms_median": numbers["first_token_ms_median"],
                "first_token_ms_p95": numbers["first_token_ms_p95"],
                "tokens_per_s": numbers["tokens_per_s"],
            }
    return {"cases": cases, "skipped": skipped, "ready_s": round(ready_s, 1)}
