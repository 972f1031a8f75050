"""Every folder under configs/ is a configuration that the handler accepts, for each TP size, without its weights.

The shapes are those that the models' authors publish in config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from dsserve.config.deepspeed import read_deepspeed_settings
from dsserve.config.handler import read_handler_config
from dsserve.config.limits import read_context
from dsserve.config.torchserve import check_server_settings, read_time_limits
from dsserve.injection.families import check_model
from dsserve.injection.workspace import WorkspaceSize
from dsserve.parallel.kv_heads import plan_kv_copies
from dsserve.parallel.rank import RankInfo
from dsserve.runner.kv_memory import plan_kv
from scripts.pack.archive import CONFIGS, Choice, PackageError, render

GPU_BYTES = 80 * 10**9
TP = (1, 2, 4, 8)


def llama(**shape: Any) -> PretrainedConfig:
    return LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **shape)


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "smollm2": lambda: LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Qwen3-8B": lambda: Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
    ),
    "Mistral-7B-Instruct-v0.3": lambda: MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=32768, max_position_embeddings=32768, sliding_window=None,
    ),
    "Llama-3.1-8B-Instruct": lambda: llama(
        intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072
    ),
    "Llama-2-7b-chat-hf": lambda: llama(
        intermediate_size=11008, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096
    ),
    "opt-6.7b": lambda: OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, vocab_size=50272,
        max_position_embeddings=2048, word_embed_proj_dim=4096,
    ),
    "gpt-j-6b": lambda: GPTJConfig(
        n_embd=4096, n_layer=28, n_head=16, vocab_size=50400, n_positions=2048, rotary_dim=64
    ),
}  # fmt: skip
KERNEL_INJECTION = {"opt-6.7b", "gpt-j-6b", "Llama-2-7b-chat-hf"}
FOLDERS = sorted(path.parent.name for path in CONFIGS.glob("*/model-config.yaml"))


def test_every_folder_is_checked() -> None:
    assert sorted(SHAPES) == FOLDERS


@pytest.fixture(scope="module", params=SHAPES)
def outline(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Name and model of a configuration, on the meta device."""
    with torch.device("meta"):
        return request.param, AutoModelForCausalLM.from_config(SHAPES[request.param](), dtype=torch.bfloat16)


def rendered(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `make mar` packs it, on a machine with eight GPUs, or on a CPU that has bf16."""
    monkeypatch.setattr("scripts.common.machine.count_gpus", lambda: 8)
    monkeypatch.setattr("scripts.common.machine.has_bf16", lambda cpuinfo: True)
    return render(CONFIGS / name, "/models/x", Choice(tp=str(tp), device="cpu" if name == "smollm2" else "gpu"))


@pytest.mark.parametrize("tp", TP)
def test_it_is_accepted(outline: tuple[str, Any], tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, model = outline
    yaml_config, ds_config = rendered(name, tp, monkeypatch)
    (tmp_path / "ds-config.json").write_text(json.dumps(ds_config))
    handler = read_handler_config(yaml_config)
    check_server_settings(yaml_config, yaml_config["batchSize"], handler.stated_texts)
    read_time_limits(yaml_config, handler.collective_timeout)
    monkeypatch.setattr(
        "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.supported_dtypes",
        lambda self: [torch.float32, torch.float16, torch.bfloat16],
    )
    settings = read_deepspeed_settings(yaml_config, tmp_path, tp, torch.float32)
    assert settings.tp_size == tp
    assert settings.kernel_inject == (name in KERNEL_INJECTION)
    assert settings.dtype is (torch.float16 if settings.kernel_inject else torch.bfloat16)
    length = read_context(handler, model.config.max_position_embeddings, model.config)
    assert settings.init.get("max_out_tokens", length) == length


@pytest.mark.parametrize("tp", TP)
def test_its_heads_divide_and_it_fits(outline: tuple[str, Any], tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs of 80 GB: the weights of a rank, 2 GiB for passes, and pages for several of the longest texts."""
    name, model = outline
    if name == "smollm2":
        plan_kv_copies(model, tp)  # nine heads divide by none of the sizes and are served all the same
        return
    heads = model.config.num_attention_heads
    assert heads % tp == 0 and getattr(model.config, "num_key_value_heads", heads) % tp == 0
    assert plan_kv_copies(model, tp) == 1
    yaml_config, _ = rendered(name, tp, monkeypatch)
    handler = read_handler_config(yaml_config)
    length = read_context(handler, model.config.max_position_embeddings, model.config)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2 // tp
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GPU_BYTES - weights, GPU_BYTES))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("dsserve.runner.kv_memory.agree_on_least", lambda value, rank: value)
    rank = RankInfo(0, 0, tp, tp)
    plan = plan_kv(model.config, handler, length, torch.bfloat16, rank, torch.device("cuda"), 2 * 2**30)
    assert plan.size.rows == handler.rows("cuda") and plan.tokens > 12 * length


@pytest.mark.parametrize("tp", TP)
def test_the_kernels_serve_it(outline: tuple[str, Any], tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a load by kernel injection refuses, and the workspace for all rows beside the weights on GPUs of 80 GB."""
    name, model = outline
    if name not in KERNEL_INJECTION:
        return
    yaml_config, ds_config = rendered(name, tp, monkeypatch)
    rows, tokens = read_handler_config(yaml_config).batch_rows, ds_config["max_out_tokens"]
    check_model(model.config, tp, torch.float16, tokens)
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    wide = getattr(model.config, "intermediate_size", 4 * hidden)
    layer = SimpleNamespace(
        hidden_size=hidden, mp_size=tp, heads=heads, intermediate_size=wide, mlp_act_func_type=None
    )  # fmt: skip
    taken = WorkspaceSize.plan(rows, tokens, layer).taken_rows
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2 // tp
    values = 10 * hidden + heads // tp * tokens + 2 * model.config.num_hidden_layers * hidden // tp  # a token's
    assert weights + 2 * taken * tokens * values < GPU_BYTES


def test_a_template_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model-config.yaml").write_text("template: none\n")
    with pytest.raises(PackageError, match="no configs/none"):
        render(tmp_path / "m", "x", Choice(device="cpu"))


def test_a_configuration_changes_only_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    template, _ = render(CONFIGS / "smollm2", "/models/x", Choice(tp="2", device="cpu"))
    del template["startupTimeout"]  # follows from the model's size
    found, _ = rendered("Qwen3-8B", 2, monkeypatch)
    assert found == template | {"deviceType": "gpu", "handler": template["handler"] | {"max_model_len": 8192}}
