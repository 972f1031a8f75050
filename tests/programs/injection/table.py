"""The table of docs/kernel-injection.md on 1 to 8 ranks without GPUs: each architecture's largest error of all cases.

    python -m tests.programs.injection.table --ranks 1,2,3,4,8

Over the stand-in of the kernels (`kernels`), tiny models, fp32; takes some minutes.
"""

from __future__ import annotations

from typing import Any

import typer

from tests.programs.injection.models import ENCODERS
from tests.support.ranks import run_ranks

ARCHITECTURES = (
    "gpt2", "opt", "opt-80", "opt-post", "opt-9", "gptj", "gpt_neo", "llama", "llama-gqa", "llama-80", "bloom",
    "gpt_neox", "gpt_neox-80", *ENCODERS,
)  # fmt: skip


def outcome(found: dict[str, Any]) -> str:
    if "refused" in found:
        return "refused"
    worst = max(max(case["prefill"], case["decode"]) for case in found.values())
    return f"{worst:.1e}{'' if all(case['passes'] for case in found.values()) else ' WRONG'}"


def main(
    ranks: str = typer.Option("1,2,3,4,8"), only: str = typer.Option("", help="architectures, with commas")
) -> None:
    """Print the table as Markdown."""
    sizes = [int(size) for size in ranks.split(",")]
    names = only.split(",") if only else list(ARCHITECTURES)
    columns = []
    for size in sizes:
        found = run_ranks(
            "tests.programs.injection.cell:run_cells", size, timeout_s=1800, env={"OMP_NUM_THREADS": "1"}, names=names,
            dtype="fp32",
        )  # fmt: skip
        columns.append(found[0])
    print("| model | " + " | ".join(f"TP={size}" for size in sizes) + " |")
    print("| --- |" + " --- |" * len(sizes))
    for name in names:
        print(f"| {name} | " + " | ".join(outcome(column[name]) for column in columns) + " |")


if __name__ == "__main__":
    typer.run(main)
