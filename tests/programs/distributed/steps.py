"""What the ranks do in the tests of this folder. Runs under torchrun, by `tests.support.ranks.run_ranks`."""

from __future__ import annotations

import gc
import glob
import os
import weakref
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dsserve.core.step_plan import Admission, Plan
from dsserve.kernels.ops import load_ops
from dsserve.loading.ds_engine import shard_model, shard_shapes
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.modeling.linear import can_pack, pack_weights
from dsserve.parallel.collectives import count_all_reduces, uses_shared_memory
from dsserve.parallel.plan_channel import PlanChannel
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.warmup import verify_runner
from tests.support.contexts import make_context


def make_engine(path: str, dtype: str, device_type: str = "cpu") -> Any:
    """The real model, sharded; the model is loaded whole first, as a handler does."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return shard_model(model, make_context(path, {"deviceType": device_type, "deepspeed": {"dtype": dtype}}))


def logits_and_shards(path: str) -> dict[str, Any]:
    """Error of the sharded logits against transformers, shard shapes, all-reduces of one forward pass."""
    token_ids = torch.randint(49152, (1, 48), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(token_ids).logits
        module = make_engine(path, "fp32").module
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
    module = make_engine(path, "bf16").module
    ours = logits(module)
    return {
        "ours": ((ours - expected).norm() / expected.norm()).item(),
        "theirs": ((theirs - expected).norm() / expected.norm()).item(),
        "frequencies": str(module.model.rotary_emb.inv_freq.dtype),
    }


def engine_errors(path: str, dtype: str) -> dict[str, Any]:
    """Relative error of the logits through ragged KV slots: as sharded, then with packed weights, then with compiled
    operations too."""
    engine = make_engine(path, dtype)
    plain = verify_runner(ModelRunner(engine.module, 4, 256, torch.device("cpu")), engine.self_check)
    gc.collect()
    gc.disable()
    sharded = [weakref.ref(layer.weight) for layer in engine.module.modules() if hasattr(layer, "tp_index")]
    packs = can_pack(engine.module)  # as the handler asks: a CPU without AVX-512 has no bf16 to pack for
    if packs:
        pack_weights(engine.module)
    left = sum(weight() is not None for weight in sharded)
    gc.enable()
    packed = verify_runner(ModelRunner(engine.module, 4, 256, torch.device("cpu")), engine.self_check)
    ops = load_ops(torch.device("cpu"))
    compiled = ops is not None and use_fused_ops(engine.module, ops) > 60
    fused = verify_runner(ModelRunner(engine.module, 4, 256, torch.device("cpu")), engine.self_check)
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


def packed_prefill_error(path: str) -> float:
    """Largest difference of logits, fp32, between prompts that are read in one pass and each alone, and likewise of the
    token after: every number of prompts, beside rows that live already."""
    runner = ModelRunner(make_engine(path, "fp32").module, 8, 64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 16, 7, 33, 2, 40, 5, 63)
    prompts = tuple(Admission(tuple(torch.randint(49152, (n,), generator=generator).tolist())) for n in lengths)

    def run(**plan: Any) -> torch.Tensor:
        logits = runner.execute(Plan(**plan))
        assert logits is not None
        return logits.next

    alone = []
    for prompt in prompts:
        alone.append((run(admit=(prompt,))[0], run(tokens=(9,))[0]))
        runner.execute(Plan(evict=(0,)))
    worst = 0.0
    for split in range(1, len(prompts)):
        first = torch.cat([run(admit=prompts[:split]), run(admit=prompts[split:])])
        second = run(tokens=(9,) * len(prompts))
        for row, (one, two) in enumerate(alone):
            worst = max(worst, (first[row] - one).abs().max().item(), (second[row] - two).abs().max().item())
        runner.execute(Plan(evict=tuple(reversed(range(len(prompts))))))
    return worst


def carry_plans(path: str) -> list[list[int]]:
    """Rank 0 sends plans of several lengths; every rank returns what it holds."""
    make_engine(path, "fp32")
    rank = RankInfo.from_env()
    channel = PlanChannel(rank.rank, rank.world_size)
    admit = (Admission((7,) * 300, 3, 17, True), Admission((1, 2)))
    plans = [Plan(last=True), Plan(((1, 9),), (1, 0), (5, 6, 49151), admit, False), Plan(tokens=(3,) * 55)]
    carried = []
    for plan in plans:
        if rank.is_leader:
            channel.send(plan)
        carried.append((plan if rank.is_leader else channel.receive()).encode())
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
