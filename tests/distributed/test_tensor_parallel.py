"""Two real ranks, the real SmolLM2: DeepSpeed's sharding, our KV pages and the plan channel are exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks

STEPS = "tests.programs.distributed.steps"


@pytest.fixture(scope="module")
def facts(smollm2: Path) -> list[dict]:
    return run_ranks(f"{STEPS}:logits_and_shards", path=str(smollm2))


def test_logits_are_transformers(facts: list[dict]) -> None:
    for rank in facts:
        assert rank["largest"] > 5
        assert rank["error"] < 1e-3


def test_nine_heads_are_split_six_to_three(facts: list[dict]) -> None:
    first, second = (rank["shapes"] for rank in facts)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert [first[f"{attention}.q_proj"], second[f"{attention}.q_proj"]] == [[384, 576], [192, 576]]
    assert [first[f"{attention}.k_proj"], second[f"{attention}.k_proj"]] == [[128, 576], [64, 576]]
    assert [first[f"{attention}.o_proj"], second[f"{attention}.o_proj"]] == [[576, 384], [576, 192]]
    assert [first[f"{mlp}.down_proj"], second[f"{mlp}.down_proj"]] == [[576, 768], [576, 768]]


def test_two_all_reduces_a_layer_and_one_for_the_logits(facts: list[dict]) -> None:
    assert all(rank["all_reduces"] == 2 * rank["layers"] + 1 for rank in facts)


def test_no_shared_memory_is_left_by_name(facts: list[dict]) -> None:
    assert all(rank["left_in_shm"] == [] for rank in facts)


def test_without_a_compiler_gloo_gives_the_same_logits(smollm2: Path, tmp_path: Path) -> None:
    """An empty PATH beside the interpreter's folder hides g++; the ranks must agree on gloo and stay exact."""
    hidden = {"PATH": str(tmp_path)}
    for rank in run_ranks(f"{STEPS}:logits_and_shards", path=str(smollm2), env=hidden):
        assert rank["shared_memory"] is False
        assert rank["error"] < 1e-3


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_kv_pages_packing_and_compiled_operations_keep_the_logits(smollm2: Path, dtype: str, limit: float) -> None:
    for rank in run_ranks(f"{STEPS}:engine_errors", path=str(smollm2), dtype=dtype):
        assert rank["plain"] < limit
        assert rank["packed"] < limit
        assert rank["sharded"] == 30 * 7 + 1
        if rank["packs"]:
            assert rank["left"] == 0, "sharded weights lie beside the packed ones"
            assert rank["head"] == "VocabParallelHead"
        else:
            assert dtype == "bf16" and rank["left"] == rank["sharded"], "only a dtype that the CPU lacks stays as it is"
        assert rank["compiled"] and rank["fused"] < limit
        assert rank["frequencies"] == "torch.float32", "positions of long prompts would be rounded"


@pytest.mark.long
def test_positions_of_long_prompts_are_not_rounded(smollm2: Path) -> None:
    for rank in run_ranks(f"{STEPS}:errors_at_long_positions", path=str(smollm2), length=1500):
        assert rank["frequencies"] == "torch.float32"
        assert rank["ours"] < 1.25 * rank["theirs"]


def test_prompts_in_one_pass_have_the_logits_of_each_alone(smollm2: Path) -> None:
    for error in run_ranks(f"{STEPS}:packed_prefill_error", path=str(smollm2)):
        assert error < 1e-3


def test_all_ranks_hold_the_same_plans(smollm2: Path) -> None:
    """Also with a LOCAL_SIZE from outside, with which DeepSpeed's all-reduce would crash."""
    first, second = run_ranks(f"{STEPS}:carry_plans", path=str(smollm2), env={"LOCAL_SIZE": "7"})
    assert first == second and len(first) == 3


@pytest.mark.parametrize(
    ("yaml_config", "words"),
    [
        ({"deepspeed": {"tp": {"tp_size": 4}}, "torchrun": {"nproc-per-node": 2}}, ["tp_size = 4", "= 2", "deviceIds"]),
        ({"deepspeed": {"dtype": "bf16"}, "deviceIds": [0]}, ["tp_size", "nproc-per-node", "len(deviceIds) = 1"]),
        ({"deepspeed": {"config": "missing.json"}}, ["missing.json", "--extra-files"]),
    ],
)
def test_bad_configurations_end_with_one_line_on_every_rank(smollm2: Path, yaml_config: dict, words: list[str]) -> None:
    for message in run_ranks(f"{STEPS}:load_error", path=str(smollm2), yaml_config=yaml_config):
        assert message and "\n" not in message
        assert all(word in message for word in words)


def test_a_meta_model_loads_its_bin_weights_and_is_exact(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(b"foreign")
    for rank in run_ranks(f"{STEPS}:meta_checkpoint_error", path=str(tmp_path)):
        assert rank["error"] < 1e-5
        assert rank["files"] == ["checkpoints.json", "config.json", "pytorch_model.bin", "training_args.bin"]
