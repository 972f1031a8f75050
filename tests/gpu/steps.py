"""What the ranks do in the tests of this folder: greedy tokens of many requests through the engine.

Runs under torchrun, by `tests.ranks.run_ranks`, or in the test's own process as the only rank.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dsserve.distributed import RankInfo, select_device
from dsserve.ds_engine import get_ds_engine
from dsserve.generation.engine import Engine
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.request import GenerationRequest
from dsserve.generation.warmup import verify_runner
from tests.contexts import make_context
from tests.streams import Numbers, run

SLOTS, CONTEXT, NEW_TOKENS = 4, 256, 24
PROMPT_LENGTHS = (1, 17, 5, 73, 40, 2, 33, 9)


def prompts(vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()) for n in PROMPT_LENGTHS]


def generate(path: str, dtype: str, graphs: bool) -> dict[str, Any]:
    """Tokens of each prompt alone and of all together (twice as many as slots, admitted at different steps), and the
    engine's error against the unsharded model."""
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    ds_engine = get_ds_engine(model, make_context(path, {"deviceType": "gpu", "deepspeed": {"dtype": dtype}}))
    runner = ModelRunner(ds_engine.module, SLOTS, CONTEXT, device)
    if graphs:
        runner.capture_graphs(rank.is_leader)
    error = verify_runner(runner, ds_engine.self_check)
    engine = Engine(runner, rank, lambda _: Numbers(), frozenset())  # type: ignore[arg-type, return-value]
    requests = [
        GenerationRequest(str(index), ids, NEW_TOKENS)
        for index, ids in enumerate(prompts(ds_engine.module.config.vocab_size))
    ]
    alone = [run(engine, rank, [[request]])[request.request_id] for request in requests]
    together = run(engine, rank, [requests[:3], requests[3:4], requests[4:]])
    return {
        "error": error,
        "device": str(next(ds_engine.module.parameters()).device),
        "alone": alone,
        "together": [together[request.request_id] for request in requests],
    }
