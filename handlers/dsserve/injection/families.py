"""The architectures whose layers DeepSpeed's kernels can stand in for, and what of each the kernels cannot do.

Decides from the model's config alone, before anything is loaded for long; repairs nothing (`repairs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsserve.core.errors import LoadError

_MEND = "set replace_with_kernel_inject: false (AutoTP)"
_GELU = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
# transform.cu starts one thread for 16 bytes of a token's heads, in blocks of at most 1024 (float has its own launch).
_MOST_THREADS = 1024
# softmax.cu keeps 8 registers of 4 values for each of 256 threads.
_MOST_TOKENS = 8192

Problem = str | None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        layer: the class that DeepSpeed's policy replaces.
        activations: what the kernels compute; GELU in its tanh form.
        intermediate: the config's key of the MLP's width; None where it is always 4 * hidden.
        problem: what a config may hold that the kernels do not do, as a phrase.
        is_causal: a decoder, with a KV cache.
        gated: the MLP has a gate and any width.
    """

    layer: str
    activation: str
    activations: frozenset[str]
    intermediate: str | None
    problem: Callable[[Any], Problem] = lambda config: None
    is_causal: bool = True
    gated: bool = False


def _gpt2(config: Any) -> Problem:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "scale_attn_by_inverse_layer_idx: true or scale_attn_weights: false"
    return "add_cross_attention: true" if config.add_cross_attention else None


def _opt(config: Any) -> Problem:
    if not config.enable_bias or not config.layer_norm_elementwise_affine:
        return "enable_bias: false or layer_norm_elementwise_affine: false"
    return None


def _bloom(config: Any) -> Problem:
    held = config.apply_residual_connection_post_layernorm
    return "apply_residual_connection_post_layernorm: true" if held else None


def _gptj(config: Any) -> Problem:
    return None if config.rotary_dim else "no rotary_dim"


def _gpt_neo(config: Any) -> Problem:
    return None


def _gpt_neox(config: Any) -> Problem:
    if not config.use_parallel_residual or not config.attention_bias:
        return "use_parallel_residual: false or attention_bias: false"
    return _rope(config)


def _llama(config: Any) -> Problem:
    if config.attention_bias or config.mlp_bias:
        return "attention_bias: true or mlp_bias: true"
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        return f"head_dim {config.head_dim}, not hidden_size / num_attention_heads"
    return _rope(config)


def _rope(config: Any) -> Problem:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind == "default" else f"rope type {kind}; the kernels know the default one"


def _encoder(config: Any) -> Problem:
    decoder = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    return "is_decoder: true or add_cross_attention: true" if decoder else None


FAMILIES = {
    "gpt2": Family("GPT2Block", "activation_function", _GELU, "n_inner", _gpt2),
    "opt": Family("OPTDecoderLayer", "activation_function", _GELU | {"relu"}, "ffn_dim", _opt),
    "bloom": Family("BloomBlock", "", _GELU, None, _bloom),
    "gptj": Family("GPTJBlock", "activation_function", _GELU, "n_inner", _gptj),
    "gpt_neo": Family("GPTNeoBlock", "activation_function", _GELU, "intermediate_size", _gpt_neo),
    "gpt_neox": Family("GPTNeoXLayer", "hidden_act", _GELU, "intermediate_size", _gpt_neox),
    "llama": Family("LlamaDecoderLayer", "hidden_act", frozenset({"silu"}), None, _llama, gated=True),
    "bert": Family("BertLayer", "hidden_act", _GELU, "intermediate_size", _encoder, is_causal=False),
    "distilbert": Family("TransformerBlock", "activation", _GELU, "hidden_dim", _encoder, is_causal=False),
}


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        LoadError: DeepSpeed has no policy for it, or none that is right; the message lists those that have one.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise LoadError(
            f"replace_with_kernel_inject: {config.model_type} has no kernels; {_MEND}, or serve one of "
            f"{', '.join(FAMILIES)}"
        )
    return family


def check_model(config: Any, tp_size: int, dtype: torch.dtype, max_tokens: int) -> None:
    """Refuses what the kernels would compute wrongly or not at all.

    Args:
        max_tokens: `max_out_tokens`: prompt + output of a row.

    Raises:
        LoadError: one line with the reason and the setting that works.
    """
    family = family_of(config)
    problem = family.problem(config) or _shape_problem(config, family, tp_size, dtype)
    if problem is None and max_tokens > _MOST_TOKENS:
        raise LoadError(f"max_out_tokens {max_tokens}: the kernels' softmax ends at {_MOST_TOKENS}; lower it")
    if problem is not None:
        raise LoadError(
            f"replace_with_kernel_inject: the kernels do not serve {config.model_type} with {problem}; {_MEND}"
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses machines and dtypes without right kernels.

    Raises:
        LoadError: a CPU, or float32.
    """
    if device.type != "cuda":
        raise LoadError(f"replace_with_kernel_inject: the kernels need a GPU; {_MEND}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise LoadError(
            f"replace_with_kernel_inject: in {str(dtype).removeprefix('torch.')} the kernels multiply in half "
            f"precision (cuBLAS in tensor-op mode); set deepspeed.dtype: fp16, or {_MEND}"
        )


def _shape_problem(config: Any, family: Family, tp_size: int, dtype: torch.dtype) -> Problem:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if heads % tp_size:
        fitting = [str(size) for size in range(1, heads + 1) if heads % size == 0 and size <= 16]
        return f"{heads} attention heads on {tp_size} ranks (torchrun.nproc-per-node may be {', '.join(fitting)})"
    width = 16 // dtype.itemsize  # values of one 16-byte access
    if (hidden // heads) % width:
        return f"heads of {hidden // heads} values (only multiples of {width})"
    if dtype.itemsize == 2 and hidden // tp_size // width > _MOST_THREADS:
        return f"hidden_size {hidden} on {tp_size} rank(s) (at most {_MOST_THREADS * width} a rank)"
    if family.activation and getattr(config, family.activation) not in family.activations:
        return (
            f"{family.activation}: {getattr(config, family.activation)} (only {', '.join(sorted(family.activations))})"
        )
    if family.intermediate and (getattr(config, family.intermediate) or 4 * hidden) != 4 * hidden:
        return f"{family.intermediate} {getattr(config, family.intermediate)} (only 4 * hidden_size)"
    intermediate = config.intermediate_size if family.gated else 4 * hidden
    if intermediate % (tp_size * width):
        return f"intermediate_size {intermediate} on {tp_size} rank(s) (only multiples of {width} a rank)"
    return None
