"""What the ranks do in the tests of this folder. Runs under torchrun, by `tests.support.ranks.run_ranks`."""

from __future__ import annotations

import gc
import glob
import os
import weakref
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dsserve.core.step_plan import Segment, StepPlan, Wanted
from dsserve.kernels.ops import load_ops
from dsserve.loading.ds_engine import shard_model, shard_shapes
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.modeling.linear import can_pack, pack_weights
from dsserve.parallel.collectives import count_all_reduces, uses_shared_memory
from dsserve.parallel.plan_channel import PlanChannel
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.warmup import verify_runner
from tests.support.contexts import make_context


def make_sharded(path: str, dtype: str, device_type: str = "cpu") -> Any:
    """The real model, sharded; the model is loaded whole first, as a handler does."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return shard_model(model, make_context(path, {"deviceType": device_type, "deepspeed": {"dtype": dtype}}))


def logits_and_shards(path: str) -> dict[str, Any]:
    """Error of the sharded logits against transformers, shard shapes, all-reduces of one forward pass."""
    token_ids = torch.randint(49152, (1, 48), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(token_ids).logits
        module = make_sharded(path, "fp32").module
        with count_all_reduces() as count:
            found = module(token_ids).logits
    return {
        "error": (found - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
        "shapes": shard_shapes(module),
        "all_reduces": count[0],
        "layers": module.config.num_hidden_layers,
        "shared_memory": uses_shared_memory(),
        "left_in_shm": glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*"),
    }


def errors_at_long_positions(path: str, length: int) -> dict[str, Any]:
    """Relative error of bf16 logits at the end of a long prompt against fp32's: sharded, and transformers' own."""
    text = torch.randint(49152, (1, length), generator=torch.Generator().manual_seed(2))

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(text, logits_to_keep=64).logits.float()

    expected = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    theirs = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval())
    module = make_sharded(path, "bf16").module
    ours = logits(module)
    return {
        "ours": ((ours - expected).norm() / expected.norm()).item(),
        "theirs": ((theirs - expected).norm() / expected.norm()).item(),
        "frequencies": str(module.model.rotary_emb.inv_freq.dtype),
    }


def engine_errors(path: str, dtype: str) -> dict[str, Any]:
    """Relative error of the logits through KV pages: as sharded, with packed weights, with compiled operations too."""
    engine = make_sharded(path, dtype)
    plain = engine_error(engine)
    gc.collect()
    gc.disable()
    sharded = [weakref.ref(layer.weight) for layer in engine.module.modules() if hasattr(layer, "tp_index")]
    packs = can_pack(engine.module)  # as the handler asks: a CPU without AVX-512 has no bf16 to pack for
    if packs:
        pack_weights(engine.module)
    left = sum(weight() is not None for weight in sharded)
    gc.enable()
    packed = engine_error(engine)
    ops = load_ops(torch.device("cpu"))
    compiled = ops is not None and use_fused_ops(engine.module, ops) > 60
    fused = engine_error(engine)
    return {
        "plain": plain,
        "sharded": len(sharded),
        "left": left,
        "packs": packs,
        "packed": packed,
        "compiled": compiled,
        "frequencies": str(engine.module.model.rotary_emb.inv_freq.dtype),
        "fused": fused,
        "head": type(engine.module.lm_head).__name__,
    }


def engine_error(engine: Any) -> float:
    rank, size = RankInfo.from_env(), KVSize.of_rows(4, 256)
    return verify_runner(ModelRunner(engine.module, size, rank, torch.device("cpu")), engine.self_check)


def packed_prefill_error(path: str) -> float:
    """Largest difference of logits, fp32, between prompts that are read in one pass and each alone, and likewise of the
    token after: every number of prompts, beside rows that live already."""
    rank, size = RankInfo.from_env(), KVSize.of_rows(8, 65)
    runner = ModelRunner(make_sharded(path, "fp32").module, size, rank, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 16, 7, 33, 2, 40, 5, 63)
    prompts = [(row, torch.randint(49152, (n,), generator=generator).tolist()) for row, n in enumerate(lengths)]
    trial = runner.trial()
    alone = torch.stack([torch.cat([trial.logits(prompt), trial.logits((prompt[0], (9,)))]) for prompt in prompts])
    trial.clear()
    worst = 0.0
    for split in range(1, len(prompts)):
        first = torch.cat([trial.logits(*prompts[:split]), trial.logits(*prompts[split:])])
        second = trial.logits(*((row, (9,)) for row, _ in prompts))
        worst = max(worst, (torch.stack([first, second], dim=1) - alone).abs().max().item())
        trial.clear()
    return worst


def carry_plans(path: str) -> list[list[int]]:
    """Rank 0 sends plans of several lengths; every rank returns what it holds."""
    make_sharded(path, "fp32")
    rank = RankInfo.from_env()
    channel = PlanChannel(rank.rank, rank.world_size)
    text = Segment(2, 17, (49151,) * 300, first_block=1, blocks=(9, 8, 2**20), wanted=Wanted.NEXT | Wanted.ALL)
    mixed = (Segment(0, 5, (0,), source=3), Segment(7, 100_000, (6,), wanted=Wanted.NOTHING), text)
    plans = [StepPlan(last=True), StepPlan(mixed), StepPlan(tuple(Segment(row, 1, (3,)) for row in range(55)), True)]
    carried = []
    for plan in plans:
        if rank.is_leader:
            channel.send(plan)
        carried.append((plan if rank.is_leader else channel.receive()).encode())
        assert StepPlan.decode(carried[-1]) == plan
    return carried


def load_error(path: str, yaml_config: dict[str, Any], settings: dict[str, Any] | None = None) -> str:
    """The LoadError's text of a configuration that cannot work."""
    from dsserve.core.errors import LoadError

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    try:
        shard_model(model, make_context(path, yaml_config))
    except LoadError as error:
        return str(error)
    return ""


def meta_checkpoint_error(path: str) -> dict[str, Any]:
    """A model made on the meta device, its .bin weights listed by `deepspeed.checkpoint`: error of the logits."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    deepspeed = {"dtype": "fp32", "checkpoint": "checkpoints.json"}
    engine = shard_model(model, make_context(path, {"deepspeed": deepspeed, "handler": {"model_path": "."}}))
    token_ids = torch.arange(40)[None]
    with torch.inference_mode():
        error = (engine.module(token_ids).logits - reference(token_ids).logits).abs().max().item()
    return {"error": error, "files": sorted(os.listdir(path))}
