"""Tiny random models as folders: recipes of many architectures, a byte-level tokenizer, and the handler's settings.

Three or four layers, 64 wide, a context of 256, a vocabulary of 512: a folder is made and loaded in about a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 512, 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # so that attention matters
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
HALF = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 4,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "n_inner": 128}

# Name -> (model_type, what changes or extends `SHAPE`).
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": CONTEXT}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": CONTEXT}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "deepseek_v2": ("deepseek_v2", {**MLA, **MOE, "first_k_dense_replace": 3}),
    "deepseek_v3": ("deepseek_v3", {**MLA, **MOE, "first_k_dense_replace": 1}),
    "minicpm3": ("minicpm3", MLA),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", MOE),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", MOE),
    "cohere": ("cohere", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "smollm3": ("smollm3", {}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "ernie4_5": ("ernie4_5", {}),
    "helium": ("helium", {"head_dim": 16}),
    "mixtral": ("mixtral", MOE),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 16}),
    "dots1": ("dots1", {**MOE, "n_shared_experts": 1, "head_dim": 16, "sliding_window": None}),
    "phimoe": ("phimoe", MOE),
    "gpt_oss": ("gpt_oss", {**MOE, "head_dim": 16, "sliding_window": CONTEXT}),
    "bitnet": ("bitnet", {}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": CONTEXT}),
    "ministral3": ("ministral3", {"head_dim": 16}),
    "mistral_window": ("mistral", {"sliding_window": CONTEXT}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": CONTEXT, "max_window_layers": 1}),
    "gemma4": ("gemma4_text", {"head_dim": 16, "global_head_dim": 16, "sliding_window": CONTEXT,
                               "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}),
    "cohere2": ("cohere2", {"head_dim": 16, "sliding_window": CONTEXT}),
    "exaone4": ("exaone4", {"sliding_window": CONTEXT, "sliding_window_pattern": 2}),
    "olmo3": ("olmo3", {"sliding_window": CONTEXT}),
    "glm4_moe": ("glm4_moe", {**MOE, "head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "ernie4_5_moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "flex_olmo": ("flex_olmo", MOE),
    "minimax_m2": ("minimax_m2", {**MOE, "head_dim": 16}),
    "granitemoeshared": ("granitemoeshared", {**MOE, "shared_intermediate_size": 32}),
    "falcon_7b": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 3, "attention_heads": 4}),
    "aria": ("aria_text", {**MOE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "exaone_moe": ("exaone_moe", {**MOE, "sliding_window": CONTEXT}),
    "deepseek_v4": ("deepseek_v4", {**MLA, **MOE}),
    "hy_v3": ("hy_v3", {**MOE, "head_dim": 16}),
    "afmoe": ("afmoe", {**MOE, "head_dim": 16, "sliding_window": CONTEXT}),
    "lfm2_moe": ("lfm2_moe", {**MOE, "layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}),
    "olmo_hybrid": ("olmo_hybrid", {**HALF, **LINEAR}),
    "zamba2": ("zamba2", {"num_hidden_layers": 4, "mamba_d_state": 8, "mamba_headdim": 32, "mamba_ngroups": 1,
                          "layers_block_type": ["mamba", "hybrid"] * 2}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "xlstm": ("xlstm", {"num_heads": 4}),
    "rwkv": ("rwkv", {"attention_hidden_size": 64, "context_length": CONTEXT}),
    "jetmoe": ("jetmoe", {**MOE, "kv_channels": 16}),
    "cwm": ("cwm", {"sliding_window": CONTEXT, "head_dim": 16, "bos_token_id": 0}),
    "vaultgemma": ("vaultgemma", {"head_dim": 16, "sliding_window": CONTEXT}),
    "youtu": ("youtu", MLA),
    "solar_open": ("solar_open", {**MOE, "head_dim": 16}),
    "ctrl": ("ctrl", {**GPT, "dff": 128}),
    "biogpt": ("biogpt", {}),
    "openai_gpt": ("openai-gpt", {**GPT, "n_ctx": CONTEXT}),
    "diffllama": ("diffllama", {}),
    "persimmon": ("persimmon", {}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", {**GPT, "rotary_dim": 8}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", {**GPT, "multi_query": True}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT}),
    "falcon_rw": ("falcon", {"alibi": True, "multi_query": False, "bias": True, "parallel_attn": False}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "hunyuan_moe": ("hunyuan_v1_moe", {**MOE, "head_dim": 16, "moe_topk": [2, 2, 2]}),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 16, "sliding_window": CONTEXT, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "intermediate_size": 128, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
            "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3_next": ("qwen3_next", {**HALF, **LINEAR, **MOE, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "qwen3_5": ("qwen3_5_text", {**HALF, **LINEAR, "head_dim": 16}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**MOE, **MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4,
         "shared_intermediate_size": 64},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4}),
    "jamba": (
        "jamba",
        {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "mamba_d_state": 8, "num_hidden_layers": 4, "use_mamba_kernels": False},
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1, 3], "num_hidden_layers": 4}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 128}),
    "nemotron_h": (
        "nemotron_h",
        {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 32,
         "ssm_state_size": 8, "n_groups": 1, "head_dim": 16},
    ),
    "kimi_linear": ("kimi_linear", {**HALF, **MOE, **MLA, "head_dim": 16}),
    "inkling": ("inkling_text", {}),
    "minimax": ("minimax", {**HALF, **MOE, "head_dim": 16}),
    "deepseek_v32": (
        "deepseek_v32",
        {**MLA, **MOE, "first_k_dense_replace": 1, "index_n_heads": 2, "index_head_dim": 32},
    ),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "recurrent_gemma": ("recurrent_gemma", {"head_dim": 16, "attention_window_size": CONTEXT}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2,
         "window_size": 32},
    ),
    "bert": ("bert", {"is_decoder": True}),
}  # fmt: skip


def make_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


def save_model(folder: Path, name: str, **members: Any) -> Path:
    """A random model in fp32 with its tokenizer; `members` change or extend its recipe."""
    kind, recipe = RECIPES[name]
    config = AutoConfig.for_model(kind, **{**SHAPE, **recipe, **members})
    return save_config(folder, AutoModelForCausalLM, config)


def save_config(folder: Path, auto: Any, config: Any) -> Path:
    """The same of a config, by one of transformers' classes: a model of it, or the class that makes one."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32) if hasattr(auto, "from_config") else auto(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def settings(path: Path | str, **handler: Any) -> dict[str, Any]:
    """model-config.yaml for a load on a CPU, with `handler` added to its section."""
    section = {"model_path": str(path), "max_model_len": CONTEXT, "max_running": 3, "max_waiting": 8, **handler}
    server = {"continuousBatching": True, "parallelType": "tp", "minWorkers": 1, "maxWorkers": 1, "deviceType": "cpu"}
    return {**server, "deepspeed": {"dtype": "fp32"}, "handler": section}
