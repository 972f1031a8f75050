"""What `bench.gpu.run` makes of times: the bandwidth's floor, parts that are merged, and a table that hides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench.client import BenchError
from scripts.bench.gpu import run as bench_gpu
from scripts.bench.gpu.device import StepBytes
from scripts.bench.gpu.engine import summarise, summarise_admission
from scripts.bench.gpu.report import add_floor, table
from scripts.bench.gpu.run import Bench, why
from scripts.model.random import SHAPES, draw_prompts, make_config

SETTING = {"shape": "llama-6.7b", "tp": 2, "device": "gpu", "dtype": "bf16", "new_tokens": 128, "repeats": 3}
MACHINE = {"device": "2 x H200", "cpu": "c", "cores": 8, "versions": {"torch": "2.11"}}


def test_the_floor_is_the_slowest_ranks_bytes_over_its_bandwidth() -> None:
    part = {"cases": {"8": {"step_ms": 4.0}, "admission": {}}}
    fast = {"bytes": {"weights": 4_000_000_000, "kv_a_token": 500_000}, "bandwidth": 4e12}
    slow = {"bytes": {"weights": 4_000_000_000, "kv_a_token": 500_000}, "bandwidth": 2e12}
    add_floor(part, [fast, slow], prompt=128, new_tokens=128)
    assert part["cases"]["8"]["floor_ms"] == pytest.approx(2.0 + 8 * 192 * 500_000 / 2e12 * 1e3)
    assert part["cases"]["8"]["of_floor"] == pytest.approx(0.596)
    assert part["cases"]["admission"] == {}


def test_bytes_of_a_step_are_the_weights_without_the_table_and_a_tokens_keys_and_values() -> None:
    from transformers import AutoModelForCausalLM

    for shape, kv_heads in (("llama-tiny", 2), ("opt-tiny", 4)):
        model = AutoModelForCausalLM.from_config(make_config(shape, torch.float32))
        all_weights = sum(weight.nbytes for weight in model.parameters())
        found = StepBytes.of(model, ranks=1)
        assert found.weights == all_weights - 512 * 64 * 4
        assert found.kv_a_token == 2 * 2 * kv_heads * 16 * 4
        assert found.total(3, 10.0) == found.weights + 30 * found.kv_a_token
    assert StepBytes.of(model, ranks=3).kv_a_token == 2 * 2 * 2 * 16 * 4, "the rank with most heads counts"


@pytest.mark.parametrize(
    ("shape", "billions"), [("llama-6.7b", 6.7), ("llama-34b", 34), ("llama-70b", 69), ("opt-6.7b", 6.87)]
)
def test_shapes_have_the_size_of_their_name(shape: str, billions: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape, torch.bfloat16))
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


def test_prompts_are_the_same_at_each_call_and_share_nothing() -> None:
    prompts = draw_prompts(SHAPES["llama-6.7b"][1]["vocab_size"], 128, 8, seed=1)
    assert prompts == draw_prompts(32000, 128, 8, seed=1) and len({prompt[:4] for prompt in prompts}) == 8
    assert prompts[0] != draw_prompts(32000, 128, 8, seed=2)[0]


def test_rounds_are_put_together() -> None:
    rounds = [
        {"gaps": [0.004, 0.004, 0.008], "first": [0.01, 0.03], "tokens_per_s": 100.0},
        {"gaps": [0.004], "first": [0.02, 0.05], "tokens_per_s": 200.0},
    ]
    found = summarise(rounds)
    assert (found["step_ms"], found["inter_token_ms_p95"], found["tokens_per_s"]) == (4.0, 8.0, 150.0)
    assert (found["first_token_ms_median"], found["last_first_token_ms"]) == (25.0, 40.0)
    beside = summarise_admission([{"idle": [0.004], "beside": [0.01, 0.02], "first": 0.03}])
    assert (beside["idle_step_ms"], beside["inter_token_ms_max"], beside["tokens_in_between"]) == (4.0, 20.0, 2.0)


class Canned(Bench):
    """Gives a part as the ranks would."""

    def _ranks(self, way: str, prompt: int, batches: list[int], seconds: float) -> dict[str, Any]:
        if way == "autotp":
            raise BenchError("LoadError: no")
        cases = {str(batch): {"step_ms": 4.0 * batch, "floor_ms": 2.0, "of_floor": 0.5} for batch in batches}
        return {"cases": cases, "skipped": {"64": "too large"}, "bandwidth": [4.3e12], "load_s": {"files": 2.0}}

    def _http(self, prompt: int, batches: list[int], seconds: float) -> dict[str, Any]:
        return {"cases": {str(batch): {"step_ms": 5.0} for batch in batches}, "skipped": {}, "ready_s": 30.0}


def test_parts_are_merged_into_one_file_and_another_setting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "describe_machine", lambda device: MACHINE)
    out = tmp_path / "deep" / "out.json"
    Canned(SETTING, tmp_path, out).run("engine", 128, [1], 1.0)
    Canned(SETTING, tmp_path, out).run("engine", 128, [8], 1.0)
    bench = Canned(SETTING, tmp_path, out)
    bench.run("http", 128, [1], 1.0)
    bench.run("autotp", 128, [1], 1.0)
    merged = json.loads(out.read_text())
    assert merged == bench.report and list(merged["parts"]["engine"]["128"]["cases"]) == ["1", "8"]
    assert merged["parts"]["http"]["128"]["cases"]["1"]["of_floor"] == 0.4
    text = table(merged)
    assert "| this engine | 128 | 8 | 32.00 |" in text and "| vLLM 0.20.2, quoted (H200) | 128 | 1 | 3.20 |" in text
    assert "left out: this engine, prompt 128, 64 rows: too large" in text and "LoadError: no" in text
    assert "4300 to 4300 GB/s" in text and "ready 30.0 s" in text
    with pytest.raises(BenchError, match="another setting"):
        Canned({**SETTING, "tp": 4}, tmp_path, out)


def test_the_reason_of_a_failed_run_is_its_last_error() -> None:
    log = "x\nValueError: first\ndsserve.errors.LoadError: no room\nChildFailedError: \n"
    assert why(log) == "LoadError: no room"
    assert why("Root Cause:\n  traceback : Signal 9 (SIGKILL) received by PID 7\n") == "Signal 9 (SIGKILL) received"
