"""Quantized weights on one device: error of the logits, size of the weights, milliseconds a decode step.

A Llama of random weights, made on the device; the steps are the engine's own (KV slots, packed or fused matmuls; CUDA
graphs on a GPU). Random weights have no structure that rounding could spoil: use `measure_perplexity` for quality.
Prints a table and then one JSON line. Modes that the device lacks are named, not measured.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import typer

SHAPES = {
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "heads": 9, "kv_heads": 3},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "heads": 32, "kv_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32, "kv_heads": 32},
}
VOCABULARY = 32000
PROMPT, WARM_UPS = 128, 3


def make_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A random Llama, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(SHAPES[shape])
    heads, kv_heads = sizes.pop("heads"), sizes.pop("kv_heads")
    config = LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=2048,
        tie_word_embeddings=False, dtype=dtype, **sizes,
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
    """What the handler replaces after the sharding; see `generation.build`."""
    from dsserve.fused_ops import load_ops, use_fused_ops
    from dsserve.generation.decode_attention import use_decode_attention
    from dsserve.packing import can_pack, pack_weights

    if can_pack(model):
        pack_weights(model)
    ops = load_ops(device)
    if ops is not None:
        use_fused_ops(model, ops)
        if device.type == "cuda":
            use_decode_attention(model)


def step_ms(model: Any, rows: list[int], steps: int, device: torch.device) -> dict[int, float]:
    """Median milliseconds of a decode step for each number of rows."""
    from dsserve.generation.model_runner import ModelRunner
    from dsserve.generation.plan import Admission, Plan

    runner = ModelRunner(model, max(rows), PROMPT + steps + WARM_UPS + 1, device)
    if device.type == "cuda":
        runner.capture_graphs(is_leader=False)
    found = {}
    for live in rows:
        for _ in range(live):
            runner.execute(Plan(admit=(Admission((7,) * PROMPT),)))
        times = []
        for _ in range(steps + WARM_UPS):
            started = time.perf_counter()
            step = runner.execute(Plan(tokens=(5,) * live))
            assert step is not None
            step.next.argmax(dim=-1).tolist()  # waits for the device
            times.append(time.perf_counter() - started)
        found[live] = sorted(times[WARM_UPS:])[steps // 2] * 1e3
        runner.execute(Plan(evict=tuple(reversed(range(live)))))
    return found


def measure(
    mode: str, shape: str, dtype: torch.dtype, rows: list[int], steps: int, device: torch.device
) -> dict[str, Any]:
    """Error, MiB of the layers' weights before and after, and times of one mode; `none` is the model as it is.

    Raises:
        LoadError: the device lacks the mode.
    """
    from dsserve.quantization import check_device, quantize_layers

    if mode != "none":
        check_device(mode, dtype, device)
    model = make_model(shape, dtype, device)
    token_ids = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(1)).to(device)
    result: dict[str, Any] = {"mode": mode, "error": 0.0}
    with torch.inference_mode():
        exact = model(token_ids, use_cache=False).logits.float()
    layers = sum(weight.numel() * weight.element_size() for name, weight in model.named_parameters() if "_proj" in name)
    result["mib"] = layers / 2**20
    if mode != "none":
        result["mib"] = sum(layer.bytes for layer in quantize_layers(model, mode)) / 2**20
        with torch.inference_mode():
            found = model(token_ids, use_cache=False).logits.float()
        result["error"] = ((found - exact).norm() / exact.norm()).item()
    tune(model, device)
    result["ms"] = step_ms(model, rows, steps, device)
    return result


def main(
    device: str = typer.Option("cuda", help="cuda or cpu"),
    shape: str = typer.Option("7b", help=", ".join(SHAPES)),
    modes: str = typer.Option("none,int8,fp8,int4", help="with commas; none: the weights as they are"),
    dtype: str = typer.Option("bf16", help="bf16, fp16 or fp32"),
    rows: str = typer.Option("1,8,32", help="rows of a step, with commas"),
    steps: int = typer.Option(50, help="timed steps"),
) -> None:
    """Measure and print the table."""
    from dsserve.errors import LoadError

    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    name = torch.cuda.get_device_name(target) if device == "cuda" else "CPU"
    counts, results = [int(row) for row in rows.split(",")], []
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    print(f"{name}, torch {torch.__version__}, {shape}, {dtype}, prompts of {PROMPT}\n")
    print(f"| weights | error of the logits | MiB of the layers | ms a step, {' / '.join(map(str, counts))} rows |")
    print("| --- | --- | --- | --- |")
    for mode in modes.split(","):
        try:
            result = measure(mode, shape, kind, counts, steps, target)
        except LoadError as error:
            print(f"| {mode} | {error} | | |", flush=True)
            continue
        results.append(result)
        times = " / ".join(f"{result['ms'][count]:.2f}" for count in counts)
        print(f"| {mode} | {result['error']:.1e} | {result['mib']:.0f} | {times} |", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"device": name, "shape": shape, "dtype": dtype, "results": results}))


if __name__ == "__main__":
    typer.run(main)
