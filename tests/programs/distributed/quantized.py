"""Quantized shards of small random models beside the same weights rounded by plain arithmetic. Runs under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.loading.ds_engine import shard_model
from dsserve.modeling.linear import pack_weights
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.warmup import verify_runner
from tests.programs.distributed.shapes import SHAPES, VOCABULARY, randomize
from tests.support.contexts import make_context

CPU = torch.device("cpu")


def outcomes(folder: str, names: list[str], modes: list[str]) -> dict[str, dict[str, Any]]:
    """`<shape> <mode>` -> errors of the logits `[2, 40, V]`; where two ranks cannot hold the shape, the refusal.

    `rounded`: largest difference from the reference; `largest`: its largest logit; `change`: relative difference of
    the reference from the exact weights; `engine`: relative, through KV pages and packed heads.
    """
    return {f"{name} {mode}": outcome(name, mode, Path(folder)) for name in names for mode in modes}


def outcome(name: str, mode: str, folder: Path) -> dict[str, Any]:
    token_ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    try:
        engine = make_engine(name, folder, quantization=mode)
    except LoadError as error:
        return {"refused": str(error)}
    plain = make_engine(name, folder).module
    with torch.inference_mode():
        exact = plain(token_ids).logits
        round_weights(plain, mode)
        expected, found = plain(token_ids).logits, engine.module(token_ids).logits
    pack_weights(engine.module)
    runner = ModelRunner(engine.module, KVSize.of_rows(3, 64), RankInfo.from_env(), CPU)
    return {
        "rounded": (found - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
        "change": ((expected - exact).norm() / exact.norm()).item(),
        "engine": verify_runner(runner, engine.self_check),
    }


def make_engine(name: str, folder: Path, **settings: str) -> Any:
    """The shape with layers that two ranks split into whole groups of 32, unless its name says `narrow`."""
    torch.manual_seed(0)
    model = SHAPES[name.removesuffix(" narrow")]()
    if not name.endswith("narrow"):
        key = "ffn_dim" if hasattr(model.config, "ffn_dim") else "intermediate_size"
        setattr(model.config, key, 256)
        model = type(model)(model.config)
    randomize(model.eval())
    return shard_model(model, make_context(folder, {"deepspeed": {"dtype": "fp32", **settings}}))


def round_weights(module: torch.nn.Module, mode: str) -> None:
    """Rounds the weights of DeepSpeed's (on one rank: transformers') own layers, in place, all but the head's."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    head = module.get_output_embeddings()
    for child in module.modules():
        if type(child) in (torch.nn.Linear, LinearLayer, LinearAllreduce) and child is not head:
            child.weight.data = ROUND[mode](child.weight.data)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]`: steps of 1/127.5 of a row's largest value."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127.5
    return (weight * (1 / step)).round().clamp(-128, 127) * step


def int4(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]`: 16 values from the least to the largest of 32 neighbours in a row."""
    groups = weight.view(weight.shape[0], -1, 32)
    least, largest = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = (largest - least) / 15
    return (((groups - least) / step).round().clamp(0, 15) * step + least).view(weight.shape)


ROUND = {"int8": int8, "int4": int4}
