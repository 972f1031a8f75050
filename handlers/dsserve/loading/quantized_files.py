"""Weight files of quantized kinds, known by their tensors' names and dtypes, whatever the settings beside them say.

AutoTP would cut packed integers and scales as if they were weights, and transformers ignores scales that no setting
announces. Reads headers only. What config.json announces is refused by `hf_model`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dsserve.core.errors import LoadError
from dsserve.loading.weight_files import WeightFiles, find_weight_files

# What a format calls its tensors; a name that ends so belongs to no model that is not quantized.
_FORMATS = (
    ("GPTQ or AWQ", r"\.(qweight|qzeros)"),
    ("MXFP4", r"(proj|experts|weight|mlp\d)[._](blocks|scales)"),
    ("compressed-tensors", r"\.weight_(packed|shape|zero_point|g_idx|global_scale)"),
    ("FP8 with a scale a block", r"[._](weight_)?scale_inv"),
    ("FP8 or integers with scales", r"\.(weight_scale(_2)?|(input|output)_scale|scale_(weight|input)|pre_quant_scale)"),
    ("FP8 or integers with scales", r"\.(weights|activation)_scaling_factor"),
    ("bitsandbytes", r"\.(SCB|(nested_)?absmax|(nested_)?quant_map|quant_state(\.\w+)?)"),
    ("quanto", r"\.weight\._(data|scale|shift)"),
    ("torchao", r"weight[_:](_?data|qdata|_?scale|_?zero_point)"),
    ("HQQ", r"\.(W_q|W_q_packed)"),
    ("AQLM", r"\.(codes|codebooks)"),
    ("EXL2", r"\.q_(weight|scale|perm|invperm|groups|scale_max)"),
    ("EXL3", r"\.(trellis|suh|svh)"),
    ("QuIP#", r"\.Qidxs(_\d+)?"),
    ("VPTQ", r"\.(centroids|res_centroids)\.weight"),
)
_NARROW = re.compile(r"(f|float)[468](_|$)")  # F8_E4M3 as safetensors says, float8_e4m3fn as torch does
_INTEGER = re.compile(r"(i|u|int|uint|qint|quint)\d+")
_WEIGHT = re.compile(r"(weight|proj|kernel|embed\w*|experts)$")
# Where formats keep their settings, if not in config.json.
_SETTINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def refuse_quantized_files(folder: Path) -> None:
    """Looks at every tensor of the weights in a model's folder, before the long load.

    Raises:
        LoadError: a tensor of a quantized kind, with its name, dtype and format as far as it can be told.
    """
    try:
        weights = find_weight_files(folder)
    except LoadError:  # an outline needs none; the load says what is missing
        return
    form, first = None, None
    for name, dtype in _tensors(weights):
        form = _format(name)
        if first is None and (form or _is_quantized(name, dtype)):
            first = name, dtype
        if form is not None:
            break
    if first is None:
        return
    name, dtype = first
    settings = [file for file in _SETTINGS if (folder / file).is_file()]
    beside = f", settings in {settings[0]}" if settings else ""
    raise LoadError(
        f"the weight files are quantized ({form or _by_dtype(dtype)}{beside}): {name} is {dtype}; they cannot be "
        "sharded here: name the model's unquantized weights, or write them out in bf16"
    )


def _format(name: str) -> str | None:
    return next((form for form, ending in _FORMATS if re.search(f"{ending}$", name)), None)


def _by_dtype(dtype: str) -> str:
    narrow = _NARROW.match(dtype.lower())
    return f"{narrow[0].strip('_')[-1]}-bit floats" if narrow else "packed integers"


def _is_quantized(name: str, dtype: str) -> bool:
    """Integers count where a weight should be: position ids and masks are integers, too."""
    lower = dtype.lower()
    return bool(_NARROW.match(lower) or (_INTEGER.fullmatch(lower) and _WEIGHT.search(name)))


def _tensors(weights: WeightFiles) -> Iterator[tuple[str, str]]:
    """Name and dtype of every tensor; files that cannot be read are left to the load, which says so."""
    for file in weights.files:
        yield from _safetensors(file) if weights.is_safetensors else _bin(file)


def _safetensors(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- the file is no dict
                yield name, opened.get_slice(name).get_dtype()
    except (SafetensorError, OSError):
        return


def _bin(file: Path) -> Iterator[tuple[str, str]]:
    """Of a file of torch.save; a bare pickle, as torch wrote it before 1.6, would have to be read whole."""
    if not zipfile.is_zipfile(file):
        return
    try:
        content = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError):
        return
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            yield str(name), str(value.dtype).removeprefix("torch.")
