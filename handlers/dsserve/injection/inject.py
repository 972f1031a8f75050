"""A model in, DeepSpeed's engine with kernels that are right on today's transformers out.

Does not check logits (`self_check`) and does not generate (`engine`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from dsserve.config.handler import YAML_FILE
from dsserve.core.errors import LoadError
from dsserve.injection.families import check_device, check_model, family_of
from dsserve.injection.layer import InjectedLayer, LayerCall, PassState, probe_returns_tuple
from dsserve.injection.patches import forget_merge_buffers, has_injected_model, patched_deepspeed
from dsserve.injection.repairs import prepare_model, repair_config, replace_operations
from dsserve.injection.workspace import Workspace, WorkspaceSize
from dsserve.modeling.dtype import computing_in

logger = logging.getLogger(__name__)

# DeepSpeed's own default of max_out_tokens.
DEFAULT_TOKENS = 1024


def check_injection(model: Any, settings: Any, device: torch.device) -> None:
    """Refuses what the kernels cannot do, before anything is changed.

    Args:
        settings: `DeepSpeedSettings`.

    Raises:
        LoadError: see `check_model` and `check_device`; a second model in the process; `deepspeed.checkpoint`;
            `enable_cuda_graph`.
    """
    check_model(model.config, settings.tp_size, settings.dtype, _longest(settings.init))
    check_device(device, settings.dtype)
    if settings.checkpoint:
        raise LoadError(
            f"{YAML_FILE}: deepspeed.checkpoint: with kernel injection DeepSpeed unpickles weights and reads no "
            "safetensors; leave it out and load the model with from_pretrained"
        )
    if settings.init.get("enable_cuda_graph"):
        raise LoadError(
            "enable_cuda_graph: the kernels count tokens on the host, which a CUDA graph does not repeat; leave it out"
        )
    if has_injected_model():
        raise LoadError(
            "replace_with_kernel_inject: the kernels have one workspace a process, and another model has it; serve "
            "this one by a worker of its own"
        )


def _longest(init: dict[str, Any]) -> int:
    return int(init.get("max_out_tokens", DEFAULT_TOKENS))


def inject_kernels(
    model: Any, init: dict[str, Any], rows: int, init_inference: Callable[[Any, dict[str, Any]], Any]
) -> tuple[Any, Workspace]:
    """Replaces the model's layers by DeepSpeed's and takes the workspace for the largest batch.

    Args:
        model: a transformers model on the CPU, whole in every rank, that passed `check_injection`.
        init: keyword arguments for `deepspeed.init_inference`; `max_out_tokens` is the longest prompt + output.
        rows: the largest batch.
        init_inference: calls DeepSpeed with these arguments.

    Returns:
        DeepSpeed's engine and the kernels' workspace.

    Raises:
        LoadError: a workspace that does not fit.
    """
    tokens = _longest(init)
    prepare_model(model)
    places = find_layers(model)
    layer_class = type(model.get_submodule(places[0]))
    with computing_in(model, torch.float32):  # whatever dtypes the weights and a reference left the model in
        call = LayerCall.of(layer_class, probe_returns_tuple(model, model.get_submodule(places[0])))
    with patched_deepspeed():
        engine = init_inference(model, {**init, "max_out_tokens": tokens, "min_out_tokens": tokens})
    workspace = _adapt(engine.module, places, call, tokens, rows)
    _refuse_beams(engine.module)
    return engine, workspace


def _refuse_beams(module: Any) -> None:
    """`generate` with beams would reorder a cache that the kernels do not see, and go on with the wrong rows."""
    generate = getattr(module, "generate", None)
    if generate is None:
        return

    def checked(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or module.generation_config
        if (kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1:
            raise ValueError("num_beams: DeepSpeed's kernels keep one sequence a row; set it to 1")
        return generate(*args, **kwargs)

    module.generate = checked


def find_layers(model: Any) -> list[str]:
    """The places of the layers that DeepSpeed replaces."""
    name = family_of(model.config).layer
    return [place for place, module in model.named_modules() if type(module).__name__ == name]


def _adapt(module: Any, places: list[str], call: LayerCall, tokens: int, rows: int) -> Workspace:
    config = module.config
    layers: list[Any] = [module.get_submodule(place) for place in places]
    for layer in layers:
        repair_config(layer, config)
    forget_merge_buffers()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the kernels take memory beside torch
    workspace = Workspace(layers, WorkspaceSize.plan(rows, tokens, layers[0].config))
    state = PassState(workspace, wants_ones=config.model_type == "bloom")
    for index, (place, layer) in enumerate(zip(places, layers, strict=True)):
        replaced = replace_operations(layer, workspace)
        if index == 0:
            logger.info("[dsserve] kernels in %d layers; in torch: %s", len(layers), ", ".join(replaced) or "nothing")
        window = layer.config.window_size if layer.config.local_attention else None
        layer.config.local_attention = False  # the window is part of the mask
        parent, _, name = place.rpartition(".")
        setattr(module.get_submodule(parent), name, InjectedLayer(layer, call, state, index == 0, window))
    return workspace
