"""What of a config bounds the exact length, and that what does not matter to a model does not bound it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from dsserve.config.exact_context import check_pass_tokens, exact_context
from dsserve.core.errors import LoadError

LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
    "original_max_position_embeddings": 1024, "rope_theta": 1e4,
}  # fmt: skip
PHI3 = {
    "original_max_position_embeddings": 2048,
    "rope_parameters": {**LONG, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SLIDING = ["sliding_attention"] * 2
FULL = ["full_attention"] * 2


def config(model_type: str, **members: Any) -> Any:
    return AutoConfig.for_model(model_type, **{"num_hidden_layers": 2, "max_position_embeddings": 4096, **members})


CASES: list[tuple[str, dict[str, Any], tuple[int, str] | None]] = [
    ("llama", {}, None),
    ("llama", {"rope_parameters": YARN}, None),
    ("llama", {"rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}}, None),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None),
    ("llama", {"rope_parameters": DYNAMIC}, (4096, "max_position_embeddings")),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, (4096, "max_position_embeddings")),
    ("llama", {"rope_parameters": LONG}, (1024, "original_max_position_embeddings")),
    ("phi3", {**PHI3, "sliding_window": None}, (2048, "original_max_position_embeddings")),
    ("phi3", {**PHI3, "sliding_window": 100}, (100, "sliding_window")),
    ("gemma3_text", {"layer_types": FULL, "rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN}},
     (1024, "original_max_position_embeddings")),
    ("gemma3", {"text_config": {"layer_types": FULL, "num_hidden_layers": 2, "sliding_window": 512}}, None),
    ("gemma3", {"text_config": {"layer_types": SLIDING, "num_hidden_layers": 2, "sliding_window": 512}},
     (512, "sliding_window")),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 1024}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 0}, (1024, "sliding_window")),
    ("mistral", {"sliding_window": None}, None),
    ("llama4_text", {"no_rope_layers": [1, 1], "attention_chunk_size": 999, "layer_types": FULL, "floor_scale": 77},
     None),
    ("llama4_text", {"no_rope_layers": [1, 0], "attn_temperature_tuning": False, "attention_chunk_size": 999},
     (999, "attention_chunk_size")),
    ("llama4_text", {"no_rope_layers": [1, 0], "floor_scale": 77}, (77, "floor_scale")),
    ("llama", {"seq_length": 2048}, None),
    ("llama", {"seq_length": 2048, "use_logn_attn": True}, (2048, "seq_length")),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "members", "expected"), CASES)
def test_the_least_bound_counts(model_type: str, members: dict[str, Any], expected: tuple[int, str] | None) -> None:
    bound = exact_context(config(model_type, **members))
    assert (bound and (bound.tokens, bound.member)) == expected


def test_rotary_positions_of_an_unknown_kind_are_refused_whatever_the_length() -> None:
    unknown = config("llama")
    unknown.rope_parameters = {"rope_type": "spiral", "factor": 2.0}
    with pytest.raises(LoadError, match=r"kind 'spiral'.*served are default, linear, llama3, proportional, yarn"):
        exact_context(unknown)


def test_every_kind_that_transformers_computes_anew_for_each_pass_has_a_bound() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changing = {"dynamic", "longrope"}  # what `dynamic_rope_update` asks for
    for kind in ROPE_INIT_FUNCTIONS:
        found = config("llama")
        found.rope_parameters = {**LONG, "rope_type": kind}
        assert (exact_context(found) is not None) == (kind in changing), kind


def test_passes_stay_below_the_temperatures_first_step() -> None:
    scaled = config("llama4_text", no_rope_layers=[1, 0], floor_scale=64)
    check_pass_tokens(scaled, 63)
    with pytest.raises(LoadError, match="passes of up to 64 tokens"):
        check_pass_tokens(scaled, 64)
    check_pass_tokens(config("llama4_text", no_rope_layers=[1, 1], floor_scale=64), 64)
    check_pass_tokens(config("llama"), 10**6)
