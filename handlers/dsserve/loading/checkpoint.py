"""The list of weight files that `deepspeed.checkpoint` names, for models that were made on the meta device.

Finds .bin files only: DeepSpeed's own checkpoint loading reads them with torch.load and knows no safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.loading.weight_files import find_weight_files

_SINGLE = "pytorch_model.bin"


def find_bin_files(model_path: Path) -> list[Path]:
    """The .bin files that make up the model, in a fixed order.

    Raises:
        LoadError: no weights, a broken index, or a part that the index names and that is missing.
    """
    try:
        return list(find_weight_files(model_path, [_SINGLE]).files)
    except LoadError as error:
        raise LoadError(
            f"deepspeed.checkpoint: {error}; only .bin weights can be listed there: leave `checkpoint` out and load "
            "the model with from_pretrained, or save it as .bin"
        ) from None


def write_checkpoint_list(files: list[Path], destination: Path) -> None:
    """Writes DeepSpeed's checkpoint description. Call it on one rank alone; the file appears complete or not at all."""
    content = {"type": "ds_model", "checkpoints": [str(file) for file in files], "version": 1.0}
    temporary = destination.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(destination)


def restore_buffers(model: torch.nn.Module) -> None:
    """Gives the non-persistent buffers of a meta model their values; no checkpoint holds them (rotary inv_freq).

    Each module that owns one is built anew from the model's config on the CPU, and the buffers are taken from it.

    Raises:
        LoadError: a module that cannot be built from the config alone.
    """
    for path, module in _modules_with_meta_buffers(model):
        try:
            with torch.device("cpu"):
                fresh: Any = type(module)(config=getattr(module, "config", None) or model.config)
        except Exception as error:
            raise LoadError(
                f"deepspeed.checkpoint: the buffers of {path} are in no checkpoint and cannot be made from the config "
                f"({error!r:.120}); load the model with from_pretrained instead of the meta device"
            ) from None
        for name in module._non_persistent_buffers_set:
            setattr(module, name, getattr(fresh, name))


def _modules_with_meta_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for path, module in model.named_modules():
        buffers = [module._buffers.get(name) for name in module._non_persistent_buffers_set]
        if any(buffer is not None and buffer.is_meta for buffer in buffers):
            yield path, module
