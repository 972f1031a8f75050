"""Runs one function on several real torchrun ranks and brings back what each rank returned.

The function must be importable by name; a rank that fails raises here, with the workers' output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    function: str, world_size: int = 2, timeout_s: float = 240, env: dict[str, str] | None = None, **kwargs: Any
) -> list[Any]:
    """Calls `tests.<module>:<function>`(**kwargs) on `world_size` ranks; JSON in, JSON out, in the order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(world_size)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
        command += [__file__, function, json.dumps(kwargs), folder]
        paths = [str(ROOT / "handlers"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu", **(env or {})}
        # The compiler's helper programs (ninja) live beside the interpreter.
        environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"{function} failed on {world_size} ranks:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
            )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    import torch

    from dsserve.parallel.parent_watch import die_with_parent
    from dsserve.worker.exit import finish_rank

    die_with_parent()  # ranks that spin would outlive a torchrun that is killed at its time limit
    function, kwargs, folder = sys.argv[1:]
    module, name = function.split(":")
    result = getattr(import_module(module), name)(**json.loads(kwargs))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another one is within a collective
    finish_rank()


if __name__ == "__main__":
    main()
