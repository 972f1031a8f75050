"""A measurement's results come out whatever becomes of what follows it: tables, comparisons, pictures, later parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scripts.bench import http as bench
from scripts.bench.client import BenchError, Round
from scripts.bench.gpu import report as bench_gpu_report
from scripts.common.console import extra, print_report
from scripts.common.machine import AUTO
from scripts.cost import model as cost_model
from scripts.pack.archive import Choice
from scripts.reliability import soak
from scripts.reliability.soak_faults import Sample
from scripts.serve.run_dir import Record, RunDir


def fail_with(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_no_table_keeps_the_report_back(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(fail_with(FileNotFoundError("a\nb")), {"rate": 5})
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == {"rate": 5}
    assert printed.err == "left out: the table: FileNotFoundError: a b\n"


def test_an_interruption_is_no_extra() -> None:
    with pytest.raises(KeyboardInterrupt), extra("x"):
        raise KeyboardInterrupt


def engine_report() -> dict[str, Any]:
    setting = {"shape": "llama-6.7b", "dtype": "bf16", "device": "gpu", "tp": 2, "new_tokens": 8, "repeats": 1}
    case = {"step_ms": 5.0, "tokens_per_s": 200.0}
    parts = {"engine": {"128": {"cases": {"1": case}, "skipped": {}}}}
    return {"setting": setting, "machine": {"device": "GPU", "versions": {}}, "parts": parts}


@pytest.mark.parametrize("text", [None, "no JSON", "{}", '{"engines": []}'])
def test_a_bench_gpu_without_a_peers_figures_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    quoted = tmp_path / "llama-6.7b.json"
    if text is not None:
        quoted.write_text(text)
    assert "quoted" in bench_gpu_report.table(engine_report())
    monkeypatch.setattr(bench_gpu_report, "QUOTED", quoted)
    assert "| this engine | 128 | 1 | 5.00 | 200 |" in bench_gpu_report.table(engine_report())
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bench_whose_second_baseline_fails_has_its_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = iter([{1: [10.0], 8: [50.0]}])

    def generate(*_: Any) -> dict[int, list[float]]:
        try:
            return next(runs)
        except StopIteration:
            raise BenchError("out of memory") from None

    names = (*map(str, bench.CONCURRENT), bench.bench_report.SAMPLED)
    rounds = {name: [Round(64.0, [1.0], [1.0], [1.0])] for name in names}
    setting = {"model": "m", "ranks": 1, "device": "cpu", "dtype": "fp32", "repeats": 3}
    setting |= {"prompt_tokens": 1, "new_tokens": 1}
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: None)
    monkeypatch.setattr(bench, "prepare", str)
    monkeypatch.setattr(bench, "cut_prompts", lambda tokenizer: [])
    monkeypatch.setattr(bench, "package", lambda *_, **__: tmp_path)
    monkeypatch.setattr(bench, "read_setting", lambda *_: setting)
    monkeypatch.setattr(bench, "measure_generate", generate)
    monkeypatch.setattr(bench, "measure_http", lambda *_: rounds)
    report = bench.bench("m", Choice(AUTO, AUTO, AUTO), "http://x/predictions/m", 3)
    assert report["http"]["16"]["tokens_per_s"] == 64.0
    assert report["generate"]["1"] == {"tokens_per_s": 10.0, "before": 10.0} and report["aims"]
    assert "left out: the second time: BenchError: out of memory" in capsys.readouterr().err
    assert "10.0         -" in bench.bench_report.table(report)


def test_a_soak_whose_server_does_not_come_back_tells_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "CLIENTS", 0)
    monkeypatch.setattr(soak, "take_sample", lambda *_: Sample({}, {}, 0, 0, 0))
    monkeypatch.setattr(soak, "faults", lambda *_: [("kill", lambda: None)])
    monkeypatch.setattr(soak, "wait_until_served", fail_with(BenchError("not served again")))
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: None)
    report = soak.soak(RunDir(tmp_path), Record(1, "m", 8080, "", 0.0), [], 60.0, 1.0)
    assert report["failed"] == ["BenchError: not served again"] and not soak.is_passed(report)
    assert "FAILED: BenchError: not served again" in soak.table(report)


def test_a_model_without_measurements_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cost_model.app, ["--measurements", str(tmp_path / "none.json")])
    assert done.exit_code == 1 and not isinstance(done.exception, FileNotFoundError)
