"""What the engine is measured beside: transformers' `generate`, also on DeepSpeed's AutoTP module as upstream's example
calls it, and transformers' own continuous batching.

`generate` gives no times of single tokens: a step is the difference between many new tokens and one, divided.
"""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from scripts.bench.report import percentile

Prompt = tuple[int, ...]
BLOCK_TOKENS = 256  # of transformers' paged cache


def generate(model: Any, prompts: list[Prompt], new_tokens: int, repeats: int) -> dict[str, float]:
    """One batch through `generate`, greedy; all ranks of a sharded model call it together."""
    ids = torch.tensor(prompts, device=next(model.parameters()).device)
    mask = torch.ones_like(ids)

    def run(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
        made = output[:, -1].tolist()  # waits for the device
        assert len(made) == len(prompts) and output.shape[1] == ids.shape[1] + count
        return time.perf_counter() - started

    run(2)
    first = [run(1) for _ in range(repeats)]
    whole = [run(new_tokens) for _ in range(repeats)]
    return {
        "step_ms": round((median(whole) - median(first)) / (new_tokens - 1) * 1e3, 3),
        "first_token_ms_median": round(median(first) * 1e3, 2),
        "last_first_token_ms": round(median(first) * 1e3, 2),
        "tokens_per_s": round(len(prompts) * new_tokens / median(whole), 1),
    }


def continuous_batching(model: Any, prompts: list[Prompt], new_tokens: int, repeats: int) -> dict[str, float]:
    """One batch through transformers' `generate_batch`, on one device."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig()
    if next(model.parameters()).device.type == "cpu":  # by itself it takes all of the host's memory for its cache
        blocks = len(prompts) * (2 + (len(prompts[0]) + new_tokens) // BLOCK_TOKENS)
        batching = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=BLOCK_TOKENS, max_memory_percent=0.05)
    options = {"generation_config": config, "continuous_batching_config": batching, "record_timestamps": True}
    inputs = [list(prompt) for prompt in prompts]
    gaps, first, rates = [], [], []
    for repeat in range(repeats + 1):
        outputs = model.generate_batch(inputs, **options).values()
        if repeat == 0:
            continue  # compiles and captures
        times = [output.timestamps for output in outputs]
        if any(len(found) != new_tokens for found in times):
            raise RuntimeError(f"continuous batching made {[len(found) for found in times]} tokens")
        gaps += [(after - before) * 1e3 for found in times for before, after in pairwise(found)]
        first += [(output.timestamps[0] - output.created_time) * 1e3 for output in outputs]
        wall = max(found[-1] for found in times) - min(output.created_time for output in outputs)
        rates.append(len(prompts) * new_tokens / wall)
    return {
        "step_ms": round(median(gaps), 3),
        "inter_token_ms_p95": round(percentile(gaps, 95), 3),
        "first_token_ms_median": round(median(first), 2),
        "first_token_ms_p95": round(percentile(first, 95), 2),
        "tokens_per_s": round(median(rates), 1),
    }
