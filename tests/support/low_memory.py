"""An engine as the handler makes it, on ranks that have little memory left: what the tests of several folders share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from dsserve.config.handler import HandlerConfig
from dsserve.core.request import GenerationRequest
from dsserve.engine.build import build_engine
from dsserve.loading.load_clock import LoadClock
from dsserve.parallel.process_group import init_process_group
from dsserve.parallel.rank import RankInfo, prepare_environment, select_device
from dsserve.worker.load import load_sharded
from tests.support.contexts import make_context
from tests.support.streams import run_or_fail

NEW_TOKENS = 4


def serve(path: str, device_type: str, dtype: str, free_mib: list[int], prompt: int, count: int) -> dict[str, Any]:
    """How many tokens' pages and how many rows so much memory beside the weights gives, and what `count` prompts that
    come at once get: their text, or their error's status.

    Args:
        free_mib: of each rank. On a GPU a tensor takes the rest; on a CPU, whose memory the ranks share, it is what the
            rank is told.
    """
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    config = HandlerConfig(model_path=path, max_new_tokens=NEW_TOKENS)
    clock = LoadClock(rank.rank, device)
    context = make_context(path, {"deviceType": device_type, "deepspeed": {"dtype": dtype}})
    prepare_environment(device, rank)
    init_process_group(rank)
    loaded, sharded = load_sharded(context, config, Path(path), rank, device, clock)
    free = free_mib[rank.rank] * 2**20
    hog = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        hog = torch.empty(torch.cuda.mem_get_info(device)[0] - free, dtype=torch.uint8, device=device)
    else:
        psutil.virtual_memory = lambda: SimpleNamespace(available=free)
    engine, limits, _ = build_engine(sharded, loaded, config, rank, device, clock)
    requests = [GenerationRequest(str(number), (number + 1,) * prompt, NEW_TOKENS) for number in range(count)]
    answers = run_or_fail(engine, rank, [requests])
    del hog
    return {"tokens": engine._scheduler.kv.tokens, "rows": limits.max_running, "answers": answers}
