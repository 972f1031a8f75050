"""What the ranks do in `test_kv_plan`: an engine as the handler makes it, on a GPU with little memory left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsserve.config import HandlerConfig
from dsserve.distributed import RankInfo, select_device
from dsserve.ds_engine import get_ds_engine
from dsserve.generation.build import build_engine
from dsserve.generation.request import GenerationRequest
from dsserve.hf_model import load_model
from dsserve.load_clock import LoadClock
from tests.contexts import make_context
from tests.streams import run_or_fail

NEW_TOKENS = 4


def serve(path: str, free_gib: float, prompt: int, count: int, device_type: str = "gpu") -> dict[str, Any]:
    """The slots that so much memory beside the weights gives, and what `count` prompts that come at once get: their
    text, or their error's status."""
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    config = HandlerConfig(model_path=path, max_new_tokens=NEW_TOKENS)
    clock, loaded = LoadClock(rank.rank, device), load_model(config, Path(path))
    context = make_context(path, {"deviceType": device_type, "deepspeed": {"dtype": "bf16"}})
    ds_engine = get_ds_engine(loaded.model, context, None, clock, config.most_running)
    hog = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        taken = torch.cuda.mem_get_info(device)[0] - int(free_gib * 2**30)
        hog = torch.empty(taken, dtype=torch.uint8, device=device)
    engine, limits, _ = build_engine(ds_engine, loaded, config, rank, device, clock)
    requests = [GenerationRequest(str(number), (number + 1,) * prompt, NEW_TOKENS) for number in range(count)]
    answers = run_or_fail(engine, rank, [requests])
    del hog
    return {"slots": limits.max_running, "answers": answers}
