"""What the ranks do for `test_load_errors`: loads that end alike on all of them, and sums where an op is missing."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

import deepspeed_handler
from dsserve.core.errors import LoadError
from dsserve.parallel.collectives import all_reduce, uses_shared_memory
from dsserve.parallel.process_group import init_process_group
from dsserve.parallel.rank import RankInfo, prepare_environment, select_device
from tests.support.contexts import make_context
from tests.support.tiny_models import settings


def reasons(folders: dict[str, str]) -> dict[str, str]:
    """Name of a model's folder -> why it is not served; empty where it is."""
    return {name: _reason(folder) for name, folder in folders.items()}


def _reason(folder: str) -> str:
    try:
        deepspeed_handler.DeepSpeedHandler().initialize(make_context(folder, settings(folder, warmup=False)))
    except LoadError as error:
        return str(error)
    return ""


def sum_without_op(broken: list[int]) -> dict[str, Any]:
    """A sum over the ranks, some of which have no folder to compile in."""
    rank = RankInfo.from_env()
    lines: list[str] = []
    logging.getLogger("dsserve").addHandler(_Lines(lines))
    if rank.rank in broken:
        os.environ["TORCH_EXTENSIONS_DIR"] = f"{__file__}/extensions"
    prepare_environment(select_device("cpu", rank), rank)
    init_process_group(rank)
    value = all_reduce(torch.tensor([1.0 + rank.rank]))
    return {"sum": value.item(), "shared_memory": uses_shared_memory(), "lines": lines}


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
