"""The table of quantized weights' errors and speeds, on a CPU and a tiny shape."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from scripts.bench import quantization as bench_quantization


def test_the_table_and_the_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": 4, "kv_heads": 2}
    monkeypatch.setitem(bench_quantization.SHAPES, "tiny", sizes)
    app = typer.Typer()
    app.command()(bench_quantization.main)
    words = ["--device", "cpu", "--shape", "tiny", "--rows", "1,3", "--steps", "20"]
    words += ["--modes", "none,int8,fp8,int4,deepspeed-int8,deepspeed-int4"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "fp8 is not measured: model-config.yaml: deepspeed.quantization: fp8 needs a GPU" in done.output
    results = {result["mode"]: result for result in json.loads(done.output.splitlines()[-1])["results"]}
    assert list(results) == ["none", "int8", "int4", "deepspeed-int8", "deepspeed-int4"]
    assert results["none"]["error"] == 0.0
    for prefix in ("", "deepspeed-"):
        assert 1e-3 < results[prefix + "int8"]["error"] < results[prefix + "int4"]["error"] < 0.3
    # q, k, v, o: 2 * 64 * 64 + 2 * 64 * 32; gate, up, down: 3 * 64 * 128; two bytes each, two layers
    assert results["none"]["mib"] == (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * 2 * 2 / 2**20
    assert results["int8"]["mib"] < 0.57 * results["none"]["mib"]
    assert results["int4"]["mib"] < 0.35 * results["none"]["mib"]
    assert all(set(result["ms"]) == {"1", "3"} and min(result["ms"].values()) > 0 for result in results.values())
