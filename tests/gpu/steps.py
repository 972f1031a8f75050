"""What the ranks do in the tests of this folder: greedy tokens of many requests through the engine.

Runs under torchrun, by `tests.ranks.run_ranks`, or in the test's own process as the only rank.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dsserve.distributed import RankInfo, select_device
from dsserve.ds_engine import get_ds_engine
from dsserve.fused_ops import load_ops, use_fused_ops
from dsserve.generation.decode_attention import use_decode_attention
from dsserve.generation.device_sampler import DeviceSampler
from dsserve.generation.engine import Engine
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.request import GenerationRequest
from dsserve.generation.warmup import verify_runner
from dsserve.packing import pack_weights
from tests.contexts import make_context
from tests.streams import Numbers, run, run_or_fail

SLOTS, CONTEXT, NEW_TOKENS = 4, 256, 24
LONG_PROMPT = 12_000  # tokens, whose activations take about 300 MB
PROMPT_LENGTHS = (1, 17, 5, 73, 40, 2, 33, 9)


def prompts(vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()) for n in PROMPT_LENGTHS]


def generate(path: str, dtype: str, step: str) -> dict[str, Any]:
    """Tokens of each prompt alone and of all together (twice as many as slots, admitted at different steps), and the
    engine's error against the unsharded model.

    Args:
        step: `eager`, `graphs`, or `fused`: graphs with fused matmuls and operations and our own attention. With
            graphs steps are launched ahead.
    """
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    ds_engine = get_ds_engine(model, make_context(path, {"deviceType": "gpu", "deepspeed": {"dtype": dtype}}))
    if step == "fused":
        assert pack_weights(ds_engine.module) and use_decode_attention(ds_engine.module)
        assert use_fused_ops(ds_engine.module, load_ops(device)) == 3 * model.config.num_hidden_layers + 2
    runner = ModelRunner(ds_engine.module, SLOTS, CONTEXT, device)
    if step != "eager":
        runner.capture_graphs(rank.is_leader, prefill=step == "fused")
    error = verify_runner(runner, ds_engine.self_check)
    sampler = DeviceSampler(runner.slots, runner.vocabulary, device)
    ahead: dict[str, Any] = {} if step == "eager" else {"launch": sampler.launch, "launch_ahead": True}
    engine = Engine(runner, rank, lambda _: Numbers(), frozenset(), **ahead)  # type: ignore[arg-type, return-value]
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


def fill_memory(path: str) -> dict[str, Any]:
    """A short prompt's tokens and a long one's, or their errors' status: with memory enough, with 32 MiB free on the
    last rank, and with memory enough again."""
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    module = get_ds_engine(model, make_context(path, {"deviceType": "gpu", "deepspeed": {"dtype": "fp32"}})).module
    runner = ModelRunner(module, 2, LONG_PROMPT + 64, device)
    engine = Engine(runner, rank, lambda _: Numbers(), frozenset())  # type: ignore[arg-type, return-value]
    lengths = {"short": 9, "long": LONG_PROMPT}

    def answers() -> dict[str, Any]:
        arrivals = [[GenerationRequest(name, (7,) * length, NEW_TOKENS)] for name, length in lengths.items()]
        return run_or_fail(engine, rank, arrivals)

    found = {"before": answers()}
    torch.cuda.empty_cache()
    hog = None
    if rank.rank == rank.world_size - 1:
        hog = torch.empty(torch.cuda.mem_get_info(device)[0] - 2**25, dtype=torch.uint8, device=device)
    found["full"] = answers()
    del hog
    torch.cuda.empty_cache()
    found["after"] = answers()
    return found
