"""The parity matrix of kernel injection: every architecture and dtype, each in processes of its own, several at once.

    PYTHONPATH=handlers python -m tests.programs.gpu.parity --tp 1

Compiles DeepSpeed's op first, so that the cells need not. Prints the op's times, a table whose rows come as their cells
end, and one JSON line; a cell that crashes is a row with its error. Needs as many GPUs as `--tp`; cells share them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import typer

from tests.programs.injection.cases import DECODER_CASES
from tests.programs.injection.cell import ITSELF, LIMITS
from tests.support.ranks import ROOT, run_ranks

ARCHITECTURES = (
    "gpt2", "opt", "opt-80", "opt-post", "gptj", "gpt_neo", "llama", "llama-gqa", "llama-80", "bloom", "gpt_neox",
    "gpt_neox-80", "bert", "distilbert",
)  # fmt: skip
# What a load refuses; the matrix runs it all the same and shows why.
REFUSED = {"fp32"}
_LOAD = "from deepspeed.ops.op_builder import InferenceBuilder as B; B().load(verbose=False)"


def build_op() -> dict[str, float]:
    """Seconds that the op takes to compile (or to find) and to load once compiled."""
    seconds = {}
    for name in ("first", "again"):
        started_s = time.monotonic()
        done = subprocess.run([sys.executable, "-c", _LOAD], env=_env(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"DeepSpeed's transformer_inference op cannot be compiled:\n{done.stderr[-4000:]}")
        seconds[name] = round(time.monotonic() - started_s, 1)
    return seconds


def _env() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    paths = [str(ROOT / "handlers"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "DS_ACCELERATOR": "cuda", "PATH": path, "PYTHONPATH": os.pathsep.join(paths)}


def run_one(name: str, dtype: str, tp: int, only: str, turns: str, timeout_s: float) -> dict[str, Any]:
    """One cell: its cases as far as they came, and the error that ended it, if one did."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        journal, error = Path(folder) / "journal", ""
        try:
            run_ranks(
                "tests.programs.injection.cell:run_cell", tp, timeout_s,
                {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "2"},
                name=name, dtype=dtype, device_type="gpu", only=only, allow_fp32=True, journal=str(journal),
                turns=turns,
            )  # fmt: skip
        except (RuntimeError, subprocess.TimeoutExpired) as fault:
            error = _last_words(str(fault))
        lines = journal.read_text().splitlines() if journal.is_file() else []
        cases = dict(tuple(json.loads(line)) for line in lines)
    wall_s = round(time.monotonic() - started_s)
    return {"architecture": name, "dtype": dtype, "tp": tp, "cases": cases, "error": error, "seconds": wall_s}


def _last_words(text: str) -> str:
    """The lines that name an error, of a failed launch's output."""
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if "Error" in line or "error" in line or "Signal" in line]
    return " | ".join(dict.fromkeys(telling))[-700:] or text[-300:]


def print_head() -> None:
    """The table's heading; its rows come as their cells end."""
    names = [*DECODER_CASES, ITSELF]
    print("\n" + " ".join([f"{'largest error':24}", *(f"{name[:10]:>10}" for name in names), "   s"]), flush=True)


def print_row(row: dict[str, Any]) -> None:
    cells = [_cell(row["cases"].get(name)) for name in (*DECODER_CASES, ITSELF)]
    refused = " (refused)" if row["dtype"] in REFUSED else ""
    print(" ".join([f"{row['architecture']} {row['dtype']}{refused}".ljust(24), *cells, f"{row['seconds']:4}"]))
    for name, case in row["cases"].items():
        if case["note"] or case["unexplained"]:
            print(f"      {name}: {case['unexplained']} of {case['differ']} tokens unexplained {case['note'][:300]}")
    if row["error"]:
        print(f"      ended: {row['error'][-500:]}")
    sys.stdout.flush()


def _cell(case: dict[str, Any] | None) -> str:
    if case is None:
        return " " * 9 + "-"
    return f"{max(case['prefill'], case['decode']):.0e}{'' if case['passes'] else ' !!'}".rjust(10)


def machine() -> dict[str, Any]:
    import deepspeed
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__, "limits": LIMITS,
    }  # fmt: skip


def main(
    tp: int = typer.Option(1, help="ranks, and GPUs"),
    only: str = typer.Option("", help="architectures, with commas; default: all"),
    dtypes: str = typer.Option("fp16,bf16,fp32"),
    cases: str = typer.Option("", help="cases, with commas; default: all"),
    jobs: int = typer.Option(8, help="cells that are started at once"),
    at_once: int = typer.Option(2, help="cells that use the GPUs at once"),
    timeout_s: float = typer.Option(240, help="of one cell, its wait for the GPUs included"),
    out: str = typer.Option("", help="a file for the JSON line"),
) -> None:
    """Run the matrix; exit status 1 where a cell that is served is not right."""
    started_s = time.monotonic()
    op = build_op()
    print(f"transformer_inference op: {op['first']} s the first time, {op['again']} s when compiled", flush=True)
    todo = [(name, dtype) for dtype in dtypes.split(",") for name in (only.split(",") if only else ARCHITECTURES)]
    document: dict[str, Any] = {**machine(), "tp": tp, "op_seconds": op, "wanted": len(todo), "rows": []}
    print_head()
    with tempfile.TemporaryDirectory() as turns, ThreadPoolExecutor(jobs) as pool:
        for number in range(at_once):
            Path(turns, str(number)).touch()
        cells = [pool.submit(run_one, *cell, tp, cases, turns, timeout_s) for cell in todo]
        for cell in as_completed(cells):  # what is found stays found, should the run be ended
            row = cell.result()
            print_row(row)
            document["rows"].append(row)
            keep(document, out)
    rows, wall_s = document["rows"], round(time.monotonic() - started_s)
    wrong = [f"{r['architecture']} {r['dtype']}" for r in rows if r["dtype"] not in REFUSED and not is_right(r)]
    print(f"\n{len(rows)} cells, {wall_s} s; wrong: {', '.join(wrong) or 'none'}")
    document |= {"seconds": wall_s, "wrong": wrong}
    keep(document, out)
    print(json.dumps(document))
    raise typer.Exit(1 if wrong else 0)


def keep(document: dict[str, Any], out: str) -> None:
    """Writes what is found so far, where a file was named."""
    if out:
        Path(out).write_text(json.dumps(document))


def is_right(row: dict[str, Any]) -> bool:
    """Every case ran and passed."""
    return not row["error"] and bool(row["cases"]) and all(case["passes"] for case in row["cases"].values())


if __name__ == "__main__":
    typer.run(main)
