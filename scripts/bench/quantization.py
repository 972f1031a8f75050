"""Quantized weights on one device: error of the logits, size of the weights, milliseconds a decode step.

A Llama of random weights, made on the device; the steps are the engine's own (KV pages, packed or fused matmuls; CUDA
graphs on a GPU). All modes are held at the same time and take turns, so that a busy machine slows them alike. Random
weights have no structure that rounding could spoil: use `perplexity` for quality. Prints a table and then one
JSON line. Modes that the device lacks are named, not measured.
"""

from __future__ import annotations

import gc
import json
import time
from typing import Any

import torch
import typer

from scripts.bench import deepspeed_weights

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "heads": 4, "kv_heads": 2},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "kv_heads": 3},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "heads": 32, "kv_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32, "kv_heads": 32},
}
VOCABULARY = 32000
PROMPT = 128
# Deviation of the weights x sqrt(hidden): with 0.02 at all widths a wide model's attention is nearly one-hot, and its
# logits move with every rounding, bf16's own too.
SPREAD = 0.48
TURN, WARM_UPS = 10, 2  # steps of a mode before the next one has its turn, and those of them that are not timed


def make_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A random Llama, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(SHAPES[shape])
    heads, kv_heads = sizes.pop("heads"), sizes.pop("kv_heads")
    config = LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=2048,
        tie_word_embeddings=False, dtype=dtype, initializer_range=SPREAD / sizes["hidden_size"] ** 0.5, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tune(model: Any, device: torch.device) -> None:
    """What the handler replaces after the sharding; see `dsserve.engine.build`."""
    from dsserve.kernels.ops import load_ops
    from dsserve.modeling.fused_ops import use_fused_ops
    from dsserve.modeling.linear import can_pack, pack_weights

    if can_pack(model):
        pack_weights(model)
    ops = load_ops(device)
    if ops is not None:
        use_fused_ops(model, ops)


def make_runner(mode: str, shape: str, dtype: torch.dtype, rows: int, steps: int, device: torch.device) -> Any:
    """The engine's runner with the weights of `mode` (`none`: as they are), and what it costs.

    Returns:
        The runner and `{"mode", "error", "mib", "held_mib"}`: relative error of the logits of 64 tokens, MiB of the
        layers' weights, MiB of this process for the whole model.

    Raises:
        LoadError: the device lacks the mode.
    """
    from dsserve.loading.load_clock import own_bytes
    from dsserve.modeling.quantization import check_device, quantize_layers
    from dsserve.parallel.rank import RankInfo
    from dsserve.runner.autotp import KVSize, ModelRunner

    before, is_deepspeeds = own_bytes(device), mode.startswith(deepspeed_weights.PREFIX)
    if mode != "none" and not is_deepspeeds:
        check_device(mode, dtype, device)
    model = make_model(shape, dtype, device)
    token_ids = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode():
        exact = model(token_ids, use_cache=False).logits.float()
    layers = sum(weight.nbytes for name, weight in model.named_parameters() if "_proj" in name)
    if mode != "none":
        quantize = deepspeed_weights.quantize if is_deepspeeds else quantize_layers
        layers = sum(layer.bytes for layer in quantize(model, mode))
    with torch.inference_mode():
        found = model(token_ids, use_cache=False).logits.float()
    error = ((found - exact).norm() / exact.norm()).item()
    tune(model, device)
    gc.collect()
    held = own_bytes(device) - before
    size = KVSize.of_rows(rows, PROMPT + max(steps, TURN) + 1)
    runner = ModelRunner(model, size, RankInfo(0, 0, 1, 1), device)
    if device.type == "cuda":
        runner.capture_graphs(is_leader=False, tokens=PROMPT)
    return runner, {"mode": mode, "error": error, "mib": layers / 2**20, "held_mib": held / 2**20, "ms": {}}


def time_steps(runners: list[Any], rows: int, steps: int) -> list[float]:
    """Median milliseconds of a decode step of `rows` rows, for each runner."""
    times: list[list[float]] = [[] for _ in runners]
    trials = [runner.trial() for runner in runners]
    for trial in trials:
        for row in range(rows):
            trial.step((row, (7,) * PROMPT))
    for _ in range(max(1, steps // TURN)):
        for trial, found in zip(trials, times, strict=True):
            for step in range(TURN):
                started = time.perf_counter()
                trial.logits(*((row, (5,)) for row in range(rows))).argmax(dim=-1).tolist()  # waits for the device
                if step >= WARM_UPS:
                    found.append(time.perf_counter() - started)
    return [sorted(found)[len(found) // 2] * 1e3 for found in times]


def main(
    device: str = typer.Option("cuda", help="cuda or cpu"),
    shape: str = typer.Option("7b", help=", ".join(SHAPES)),
    modes: str = typer.Option("none,int8,fp8,int4", help="with commas; none: the weights as they are; deepspeed-int8"),
    dtype: str = typer.Option("bf16", help="bf16, fp16 or fp32"),
    rows: str = typer.Option("1,8,32", help="rows of a step, with commas"),
    steps: int = typer.Option(50, help="timed steps"),
) -> None:
    """Measure and print the table."""
    from dsserve.core.errors import LoadError

    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    name = torch.cuda.get_device_name(target) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    counts, runners, results = [int(row) for row in rows.split(",")], [], []
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    for mode in modes.split(","):
        try:
            runner, result = make_runner(mode, shape, kind, max(counts), steps, target)
        except LoadError as error:
            print(f"{mode} is not measured: {error}\n", flush=True)
            continue
        runners.append(runner)
        results.append(result)
    for count in counts:
        for result, found in zip(results, time_steps(runners, count, steps), strict=True):
            result["ms"][count] = found
    print(f"{name}, torch {torch.__version__}, {shape}, {dtype}, prompts of {PROMPT}\n")
    print(f"| weights | error of the logits | MiB: layers | all | ms a step, {' / '.join(map(str, counts))} rows |")
    print("| --- | --- | --- | --- | --- |")
    for result in results:
        times = " / ".join(f"{result['ms'][count]:.2f}" for count in counts)
        sizes = f"{result['mib']:.0f} | {result['held_mib']:.0f}"
        print(f"| {result['mode']} | {result['error']:.1e} | {sizes} | {times} |")
    print(json.dumps({"device": name, "shape": shape, "dtype": dtype, "results": results}))


if __name__ == "__main__":
    typer.run(main)
