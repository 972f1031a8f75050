"""What changes with a text's length is exact up to its bound, beside neighbours and in parts, and refused beyond."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsserve.config import exact_context
from dsserve.core.errors import LoadError
from tests.contract import tiny

LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * number for number in range(8)],
    "long_factor": [2.0 + 0.5 * number for number in range(8)],
}
LLAMA4 = {"intermediate_size_mlp": 128, "num_local_experts": 4, "head_dim": 16}
CHUNKS = {"attention_chunk_size": 64, "attn_temperature_tuning": False}
SCALED = {"attention_chunk_size": 512, "floor_scale": 64, "attn_scale": 0.5, "no_rope_layers": [1, 0, 1]}


@dataclass(frozen=True)
class Case:
    """A model that is exact up to `bound` tokens, and the member of its config that is named beyond."""

    model_type: str
    member: str
    members: dict[str, Any]
    bound: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "longrope": Case(
        "phi3", "original_max_position_embeddings",
        {"original_max_position_embeddings": 64, "rope_scaling": LONG_ROPE, "sliding_window": None},
    ),
    "dynamic": Case(
        "llama", "max_position_embeddings",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama 4 chunks": Case("llama4_text", "attention_chunk_size", {**LLAMA4, **CHUNKS}),
    "llama 4 temperature": Case(
        "llama4_text", "floor_scale", {**LLAMA4, **SCALED}, settings={"max_num_batched_tokens": 32},
    ),
    "doge": Case("doge", "keep_window_size", {"keep_window_size": 64}),
    "a sliding window": Case("mistral", "sliding_window", {"sliding_window": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_beyond_the_bound_a_load_is_refused_in_one_line_that_names_what_works(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tiny.save_model(tmp_path, case.model_type, **case.members)
    with pytest.raises(LoadError) as error:
        tiny.load(folder, max_model_len=2 * case.bound, **case.settings)
    assert case.member in str(error.value) and f"set handler.max_model_len: {case.bound}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_up_to_the_bound_texts_are_transformers_beside_others_and_in_parts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tiny.save_model(tmp_path, case.model_type, **case.members)
    settings = {"max_num_batched_tokens": 32, "max_model_len": case.bound, **case.settings}
    handler = tiny.load(folder, **settings)
    new = 12
    asked = tiny.prompts((1, case.bound - new, 5, 17, case.bound - new, 30))
    tiny.assert_transformers_says(folder, asked, tiny.served(handler, asked, new))


def test_a_model_whose_context_is_left_open_is_refused_with_the_length_that_works(tmp_path: Path) -> None:
    case = CASES["longrope"]
    with pytest.raises(LoadError, match=r"the model's context is 256; set handler\.max_model_len: 64"):
        tiny.load(tiny.save_model(tmp_path, case.model_type, **case.members))


def test_a_pass_of_several_texts_that_reaches_floor_scale_is_refused(tmp_path: Path) -> None:
    case = CASES["llama 4 temperature"]
    folder = tiny.save_model(tmp_path, case.model_type, **case.members)
    with pytest.raises(LoadError, match=r"floor_scale.*lower handler\.max_num_batched_tokens"):
        tiny.load(folder, max_model_len=case.bound, max_num_batched_tokens=128)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama 4 chunks", "llama 4 temperature", "a sliding window"])
def test_members_that_are_not_known_are_found_by_the_longer_self_check(
    name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_context, "_MEMBERS", ())
    case = CASES[name]
    folder = tiny.save_model(tmp_path, case.model_type, **case.members)
    settings = {**case.settings, "max_running": rows}
    with pytest.raises(
        LoadError, match=f"self-check failed: .*{case.member} {case.bound}.*max_model_len: {case.bound}"
    ):
        tiny.load(folder, max_model_len=2 * case.bound, **settings)


def test_the_longer_self_check_passes_what_is_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of members that mean nothing to the model, one of them longer than the check reads."""
    folder = tiny.save_model(tmp_path, "llama", my_chunk_size=100, my_window=800, max_position_embeddings=1024)
    with caplog.at_level(logging.INFO):
        handler = tiny.load(folder)
    assert "self-check: my_window 800 lie beyond the 503 tokens that it reads" in caplog.text
    asked = tiny.prompts((120, 3))
    tiny.assert_transformers_says(folder, asked, tiny.served(handler, asked, 4))


def test_fp8_weights_that_nothing_announces_are_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path, "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    scales = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scales[f"{name}_scale"] = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scales[f"{name}_scale"]).to(torch.float8_e4m3fn)
    save_file({**tensors, **scales}, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"quantized \(FP8.*proj\.weight is F8_E4M3") as error:
        tiny.load(folder)
    assert "\n" not in str(error.value)
