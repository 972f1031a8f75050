"""One cell of the parity matrix, a process (or one of its ranks) of its own: every case of one architecture and dtype.

On a GPU with the real kernels and models of real shape, on a CPU with `kernels` and tiny ones.
"""

from __future__ import annotations

import fcntl
import json
import time
import traceback
from pathlib import Path
from typing import IO, Any

import torch

from dsserve.core.errors import LoadError
from dsserve.loading.ds_engine import get_ds_engine
from dsserve.parallel.rank import RankInfo, select_device
from tests.programs.injection.cases import DECODER_CASES, ENCODER_CASES, Pair, Result
from tests.programs.injection.models import ENCODERS, SIZES, make_model
from tests.support.contexts import make_context

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ITSELF = "transformers"  # the row's figure of transformers in the same dtype, for comparison
# The largest ||out - ref|| / ||ref|| of logits that rounding explains.
LIMITS = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 2e-2}


def run_cell(
    name: str, dtype: str, device_type: str, only: str = "", allow_fp32: bool = False, journal: str = "",
    turns: str = "",
) -> dict[str, Any]:  # fmt: skip
    """All cases of architecture `name`: case -> result, or the error that ended it.

    Args:
        only: names of cases, with commas; all where empty.
        allow_fp32: do not refuse fp32, to see what the kernels make of it.
        journal: a file that rank 0 appends each result to, so that a crash leaves those before it.
        turns: a folder whose files' number is that of the cells on the GPUs at once; the others wait until one ends.
    """
    rank = RankInfo.from_env()
    turn = take_turn(Path(turns)) if turns and rank.is_leader else None  # the other ranks meet rank 0 at the load
    size = "real" if device_type == "gpu" else "tiny"
    if device_type == "cpu":
        from tests.programs.injection.kernels import install

        install()
    elif allow_fp32:
        import dsserve.injection.inject as inject

        inject.check_device = lambda device, dtype: None  # type: ignore[assignment]
    device = select_device(device_type, rank)
    reference = make_model(name, size, DTYPES[dtype], str(device))
    model = make_model(name, size, DTYPES[dtype], str(device)).to("cpu", DTYPES[dtype])
    settings = {
        "dtype": dtype, "replace_with_kernel_inject": True, "max_out_tokens": SIZES[size].tokens,
        "self_check": device_type == "cpu",  # a GPU's figures are to be seen, not refused
    }  # fmt: skip
    context = make_context(".", {"deviceType": device_type, "deepspeed": settings})
    module = get_ds_engine(model, context, max_batch=SIZES[size].rows).module
    if device_type == "cpu":  # tiny matrices: a second thread only waits
        torch.set_num_threads(1)
    pair = Pair(reference, module, SIZES[size], LIMITS[dtype])
    cases = ENCODER_CASES if name in ENCODERS else DECODER_CASES
    wanted = only.split(",") if only else list(cases)
    results: dict[str, Any] = {}
    for case in wanted:
        try:
            result = cases[case](pair)
        except Exception as fault:  # a row of the table, not the end of it
            where = traceback.extract_tb(fault.__traceback__)[-1]
            result = Result(note=f"{type(fault).__name__}: {fault} ({where.filename}:{where.lineno})"[:500])
        results[case] = {**result.row(), "passes": result.passes(LIMITS[dtype])}
        if journal and rank.is_leader:
            with Path(journal).open("a") as file:
                file.write(json.dumps([case, results[case]]) + "\n")
        if "CUDA" in result.note:  # nothing works after an illegal access
            break
    if device_type == "gpu" and journal and rank.is_leader:
        pair.injected = make_model(name, size, DTYPES[dtype], str(device)).to(DTYPES[dtype])
        itself = {**pair.itself(name in ENCODERS).row(), "passes": True}
        with Path(journal).open("a") as file:
            file.write(json.dumps([ITSELF, itself]) + "\n")
    if turn is not None:
        turn.close()
    return results


def take_turn(folder: Path) -> IO[bytes]:
    """Waits until one of the folder's files is nobody's; it is this process's until it is closed, or the process ends.

    Ranks of several cells that share GPUs wait for each other in every collective: ten at once took over two minutes
    where one takes half of one.
    """
    import deepspeed  # noqa: F401  what takes long and needs no GPU comes before the turn

    while True:
        for path in folder.iterdir():
            file = path.open("rb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                file.close()
        time.sleep(0.1)


def forget_kernels() -> None:
    """DeepSpeed's state of a model with kernels, one a process, as if there had been none."""
    from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference
    from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention

    DeepSpeedTransformerInference.layer_id, DeepSpeedTransformerInference.workspace = 0, None
    DeepSpeedSelfAttention.num_layers = 0


def run_cells(names: list[str], dtype: str) -> dict[str, dict[str, Any]]:
    """Several architectures one after the other on CPUs."""
    found = {}
    for name in names:
        forget_kernels()
        try:
            found[name] = run_cell(name, dtype, "cpu")
        except LoadError as error:
            found[name] = {"refused": str(error)}
    return found


def run_without(left_out: list[tuple[str, str]]) -> list[str]:
    """What the load of each (repair, architecture) says on a CPU where that repair after injection is left out."""
    import dsserve.injection.inject as inject

    said = []
    for repair, name in left_out:
        forget_kernels()
        original = getattr(inject, repair)
        setattr(inject, repair, lambda *_: [])
        try:
            run_cell(name, "fp32", "cpu", only="one row")
            said.append("served")
        except LoadError as error:
            said.append(str(error))
        setattr(inject, repair, original)
    return said
