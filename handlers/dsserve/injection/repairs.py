"""What is put right in a model before DeepSpeed injects its kernels, and in the injected layers after that."""

from __future__ import annotations

from typing import Any

from dsserve.injection.alibi import AlibiSoftmax
from dsserve.injection.residual import SummedResidual
from dsserve.injection.rotary import RotatedAttention, kernel_rotates
from dsserve.injection.workspace import Workspace
from dsserve.parallel.kv_heads import copy_kv_heads


def prepare_model(model: Any) -> None:
    """Before injection, in place.

    Llama: grouped KV heads are repeated, one for each query head: DeepSpeed's container knows no groups.
    GPT-NeoX: DeepSpeed reads attributes that transformers' attention no longer has.
    """
    config = model.config
    if config.model_type == "llama" and config.num_key_value_heads != config.num_attention_heads:
        copy_kv_heads(model, config.num_attention_heads // config.num_key_value_heads)
    if config.model_type == "gpt_neox":
        for layer in model.base_model.layers:
            layer.attention.hidden_size = config.hidden_size
            layer.attention.num_attention_heads = config.num_attention_heads


def repair_config(layer: Any, model_config: Any) -> None:
    """After injection: settings of one of DeepSpeed's layers that it does not read from the model's config."""
    kind = model_config.model_type
    if kind == "gpt_neox":
        layer.config.rope_theta = model_config.rope_parameters["rope_theta"]
    if kind == "distilbert":  # taken for a model that normalizes first
        layer.config.pre_layer_norm = False
    if kind == "opt" and not model_config.do_layer_norm_before:  # the norms stand in each other's place
        layer.norm_w, layer.mlp.attn_nw = layer.mlp.attn_nw, layer.norm_w
        layer.norm_b, layer.mlp.attn_nb = layer.mlp.attn_nb, layer.norm_b


def replace_operations(layer: Any, workspace: Workspace) -> list[str]:
    """After injection: the operations of one layer whose kernels are wrong; returns what was replaced."""
    config, replaced = layer.config, []
    has_biases = layer.mlp.output_b is not None
    if not has_biases or (not config.pre_layer_norm and config.mp_size > 1):
        layer.mlp.residual_add_func = SummedResidual(config.mp_size)
        replaced.append("residual")
    if config.rotary_dim > 0 and not kernel_rotates(config):
        layer.attention.score_context_func = RotatedAttention(layer.attention.score_context_func, workspace)
        replaced.append("rotary")
    if hasattr(layer.attention, "softmax_func"):  # BLOOM's
        layer.attention.softmax_func = AlibiSoftmax(config.heads, layer.attention.attn_qkvw.device)
        replaced.append("alibi")
    return replaced
