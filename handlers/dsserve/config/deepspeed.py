"""The `deepspeed:` section of model-config.yaml and its ds-config.json, merged into arguments of `init_inference`.

Does not create the engine (`ds_engine`). Imports DeepSpeed: call `parallel.rank.prepare_environment` first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dsserve.config.handler import YAML_FILE, check_tp_size, describe
from dsserve.core.errors import LoadError

AUTO = "auto"
# Ours alone: they stand in model-config.yaml and DeepSpeed never sees them.
_OUR_KEYS = ("config", "checkpoint", "self_check", "quantization")
_INJECT = "replace_with_kernel_inject"

QUANTIZATION_KEY = f"{YAML_FILE}: deepspeed.quantization"

# Mode -> the largest relative error of the logits that its rounding explains; above it something is wrong.
QUANTIZATION_LIMITS = {"int8": 0.15, "fp8": 0.3, "int4": 0.7}


@dataclass(frozen=True)
class DeepSpeedSettings:
    """One checked set of settings.

    Attributes:
        init: keyword arguments for `deepspeed.init_inference`, without dtype and TP size.
        dtype: the model's dtype on the device.
        tp_size: size of the tensor parallel group.
        checkpoint: file name of the list of weight files (upstream's key), relative to the model folder.
        self_check: compare the logits before and after sharding.
        quantization: `int8`, `int4`, `fp8` (`quantization`), None for the weights as they are.
        may_fall_back: `replace_with_kernel_inject: auto`: AutoTP where the kernels cannot be had.
    """

    init: dict[str, Any]
    dtype: torch.dtype
    tp_size: int
    checkpoint: str | None
    self_check: bool
    quantization: str | None = None
    may_fall_back: bool = False

    @property
    def kernel_inject(self) -> bool:
        """Whether the kernels are to be tried."""
        return bool(self.init.get(_INJECT, False))


def read_deepspeed_settings(
    yaml_config: Mapping[str, Any], model_dir: Path, world_size: int, model_dtype: torch.dtype
) -> DeepSpeedSettings:
    """Merges the inline keys and ds-config.json, and checks the result.

    Args:
        model_dtype: what `dtype: auto` (or no dtype) stands for: the dtype of the model that is given.

    Raises:
        LoadError: a missing or invalid file, an unknown key, a key with two values, sizes that disagree,
            or a dtype that the device lacks.
    """
    section = yaml_config.get("deepspeed")
    if not isinstance(section, Mapping):
        raise LoadError(f"{YAML_FILE}: section `deepspeed:` is missing; write `deepspeed: {{config: ds-config.json}}`")
    ours = {key: section[key] for key in _OUR_KEYS if key in section}
    inline = _canonical({k: v for k, v in section.items() if k not in ours}, f"{YAML_FILE}: deepspeed")
    may_fall_back = inline.get(_INJECT) == AUTO
    inline = _without_auto({**inline, _INJECT: True} if may_fall_back else inline)
    merged = _merge(_read_file(ours.get("config"), model_dir), inline, ours.get("config"))
    _check_ours(ours)
    if "quant" in merged:
        raise LoadError("deepspeed.quant: DeepSpeed accepts it and quantizes nothing; use deepspeed.quantization: int8")
    tensor_parallel = merged.pop("tensor_parallel", None) or {}
    tp_size = check_tp_size(yaml_config, tensor_parallel.pop("tp_size", None), world_size)
    dtype = _read_dtype(merged.pop("dtype", None), model_dtype)
    _check_with_deepspeed({**merged, "tensor_parallel": {**tensor_parallel, "tp_size": tp_size}}, ours.get("config"))
    if tensor_parallel:
        merged["tensor_parallel"] = tensor_parallel
    kernel_inject = bool(merged.get(_INJECT, False))
    quantization = check_mode(ours.get("quantization"), kernel_inject)
    self_check = ours.get("self_check", True)
    return DeepSpeedSettings(merged, dtype, tp_size, ours.get("checkpoint"), self_check, quantization, may_fall_back)


def _read_file(name: Any, model_dir: Path) -> dict[str, Any]:
    if name is None:
        return {}
    if not isinstance(name, str):
        raise LoadError(f"{YAML_FILE}: deepspeed.config must be the name of a JSON file in the model folder")
    path = model_dir / name
    if not path.is_file():
        raise LoadError(
            f"{name}: no such file in the model folder; add it to the archive with --extra-files, "
            f"or correct deepspeed.config in {YAML_FILE}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{name}: not valid JSON ({error}); correct the file") from None
    if not isinstance(content, dict):
        raise LoadError(f"{name}: must hold one JSON object, found {type(content).__name__}")
    for key in _OUR_KEYS:
        if key in content:
            raise LoadError(f"{name}: {key} stands only in {YAML_FILE}'s `deepspeed:` section; move it there")
    if _holds_auto(content):
        raise LoadError(
            f'{name}: the value "auto" stands only in {YAML_FILE}\'s `deepspeed:` section (DeepSpeed drops it '
            "silently); leave the key out or move it"
        )
    return _canonical(content, name)


def _canonical(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Replaces DeepSpeed's aliases and old names by the current ones, so that two spellings cannot hide a clash."""
    names = _known_keys()
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "mp_size":
            key, value = "tensor_parallel", {"tp_size": value}
        if key not in names:
            allowed = ", ".join(sorted({*names.values(), *_OUR_KEYS}))
            raise LoadError(f"{where}: {key} is unknown to DeepSpeed's inference config; allowed: {allowed}")
        result = _merge(result, {names[key]: value}, where)
    return result


def _known_keys() -> dict[str, str]:
    """Accepted spelling -> current name, read from the installed DeepSpeed."""
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    fields = DeepSpeedInferenceConfig.model_fields
    return {**{name: name for name in fields}, **{f.alias: name for name, f in fields.items() if f.alias}}


def _merge(base: dict[str, Any], extra: Mapping[str, Any], source: Any) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(dict(merged[key]), value, source)
        elif key in merged and merged[key] != value:
            raise LoadError(
                f"deepspeed key {key} has two values: {merged[key]!r} in {source} and {value!r} in "
                f"{YAML_FILE}; keep one"
            )
        else:
            merged[key] = value
    return merged


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`auto` means "as if left out"."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != AUTO
    }


def _holds_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_auto(item) for item in value.values())
    return bool(value == AUTO)


def _check_ours(ours: Mapping[str, Any]) -> None:
    if not isinstance(ours.get("self_check", True), bool):
        raise LoadError(f"{YAML_FILE}: deepspeed.self_check must be true or false, found {ours['self_check']!r}")
    if not isinstance(ours.get("checkpoint", ""), str):
        raise LoadError(f"{YAML_FILE}: deepspeed.checkpoint must be the name of the JSON file to write")


def _read_dtype(name: Any, model_dtype: torch.dtype) -> torch.dtype:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.inference.config import DtypeEnum

    spellings = ["fp32", "fp16", "bf16"]
    try:
        dtype = model_dtype if name is None else DtypeEnum.from_str(name).value[0]
    except (ValueError, TypeError):
        raise LoadError(f"deepspeed.dtype: {name!r} is unknown; use one of {', '.join(spellings)} or auto") from None
    if dtype is torch.int8:
        raise LoadError(
            "deepspeed.dtype: int8 is no dtype to compute in; use fp32, fp16 or bf16, and deepspeed.quantization: int8"
        )
    supported = get_accelerator().supported_dtypes()
    if dtype not in supported:
        device = get_accelerator().device_name()
        names = ", ".join(str(item).removeprefix("torch.") for item in supported)
        raise LoadError(f"deepspeed.dtype: this {device} lacks {str(dtype).removeprefix('torch.')}; it has {names}")
    return dtype


def _check_with_deepspeed(settings: dict[str, Any], file_name: Any) -> None:
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    try:
        DeepSpeedInferenceConfig(**settings)
    except ValidationError as error:
        allowed = list(DeepSpeedInferenceConfig.model_fields)
        raise LoadError(f"{file_name or YAML_FILE}: {describe(error, 'deepspeed', allowed)}") from None


def check_mode(mode: Any, kernel_inject: bool) -> str | None:
    """The mode that `deepspeed.quantization` names, None where it is left out.

    Raises:
        LoadError: an unknown mode, or kernel injection, whose kernels read their own weights.
    """
    if mode is None:
        return None
    if not isinstance(mode, str) or mode not in QUANTIZATION_LIMITS:
        raise LoadError(
            f"{QUANTIZATION_KEY}: {mode!r:.80} is unknown; use one of {', '.join(QUANTIZATION_LIMITS)}, or leave it out"
        )
    if kernel_inject:
        raise LoadError(
            f"{QUANTIZATION_KEY}: {mode} needs AutoTP; set replace_with_kernel_inject: false, or leave it out"
        )
    return mode
