"""The yardstick of the benchmark: plain transformers `generate` in one process, all cores, same prompts, same dtype.

Run as a process of its own, so that nothing of it is left while the server is measured. Prints one JSON line.
"""

from __future__ import annotations

import json
import time
from typing import Any

import typer

from scripts.bench.prompts import cut_prompts

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Tokenizer and model, whose texts do not end by themselves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, TORCH_DTYPES[dtype])).eval()
    # min_new_tokens would forbid the end as well, but changes the logits on the way.
    network.generation_config.eos_token_id = None
    return tokenizer, network.to("cuda" if device == "gpu" else "cpu")


def measure(tokenizer: Any, network: Any, batch: int, new_tokens: int, repeats: int) -> list[float]:
    """Tokens per second of `repeats` runs of one batch, after one run that is not counted."""
    import torch

    inputs = tokenizer(cut_prompts(tokenizer)[:batch], return_tensors="pt").to(network.device)
    rates = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        with torch.inference_mode():
            output = network.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        made = output.shape[0] * (output.shape[1] - inputs["input_ids"].shape[1])
        rates.append(made / (time.perf_counter() - started_s))
        if made != batch * new_tokens:
            raise ValueError(f"generate made {made} tokens, {batch * new_tokens} were asked for")
    return rates[1:]


def main(
    model: str = typer.Option(..., help="folder or hub id"),
    dtype: str = typer.Option(...),
    device: str = typer.Option("cpu"),
    threads: int = typer.Option(..., help="CPU threads"),
    batches: str = typer.Option("1,8,16", help="batch sizes, with commas"),
    new_tokens: int = typer.Option(64),
    repeats: int = typer.Option(3),
) -> None:
    """Measure and print {"batch": [tokens per second, ...]}."""
    import torch

    torch.set_num_threads(threads)
    tokenizer, network = load(model, dtype, device)
    rates = {int(size): measure(tokenizer, network, int(size), new_tokens, repeats) for size in batches.split(",")}
    typer.echo(json.dumps(rates))


if __name__ == "__main__":
    typer.run(main)
