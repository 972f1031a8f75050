"""The files that hold a model's weights, looked at before the long load: which they are, and whether they are whole.

Reads names, sizes and headers only, never the weights (`hf_model`, `shard_cache`).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsserve.core.errors import LoadError

# In the order in which transformers looks for them.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
# Named where there are no weights: other names, or formats of other programs.
_OTHER_FORMATS = ("*.safetensors", "*.bin", "*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.ot")
_MEND = "; download or save the model again"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one model, in a fixed order.

    Attributes:
        index: tensor name -> file name, as the index of a sharded model says; empty for a single file.
    """

    files: tuple[Path, ...]
    index: dict[str, str]

    @property
    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def is_safetensors(self) -> bool:
        return self.files[0].suffix == ".safetensors"


def find_weight_files(folder: Path, kinds: Iterable[str] = _SINGLE) -> WeightFiles:
    """The files that transformers would load; training_args.bin and its like are none of them.

    Args:
        kinds: names of a single file, in order of preference; `<name>.index.json` names the parts of a sharded model.

    Raises:
        LoadError: no weights, a broken index, or a part that the index names and that is missing.
    """
    for name in kinds:
        if (folder / name).is_file():
            return WeightFiles((folder / name,), {})
        if (folder / f"{name}.index.json").is_file():
            return _read_index(folder, f"{name}.index.json")
    others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
    found = f" (found, and not served: {', '.join(others[:5])})" if others else ""
    raise LoadError(
        f"{folder} holds no weights: none of {', '.join(kinds)}, and no index of them{found}; download or save the "
        "model in that format"
    )


def _read_index(folder: Path, name: str) -> WeightFiles:
    try:
        content = json.loads((folder / name).read_text("utf-8"))
        index = {str(key): str(file) for key, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{name}: not a weight index ({error!r:.120}){_MEND}") from None
    files = sorted(set(index.values()))
    if not files or any(Path(file).name != file for file in files):
        raise LoadError(f"{name}: not a weight index (it must name files of its own folder){_MEND}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise LoadError(f"{', '.join(missing)} not found in {folder}, though {name} names them{_MEND}")
    return WeightFiles(tuple(folder / file for file in files), index)


def check_weight_files(weights: WeightFiles) -> None:
    """Opens every file and compares the tensors' names with the index.

    Raises:
        LoadError: a file that is cut short or is something else, a tensor in two files, or one that the index names
            and that is not in its file.
    """
    if not weights.is_safetensors:
        for file in weights.files:
            _check_bin(file)
        return
    found: dict[str, str] = {}
    for file in weights.files:
        for key in read_names(file):
            if key in found:
                raise LoadError(f"{found[key]} and {file.name} both hold {key}{_MEND}")
            found[key] = file.name
    lost = [key for key, file in weights.index.items() if found.get(key) != file]
    if lost:
        raise LoadError(f"{weights.index[lost[0]]} lacks {_some(lost)}, which the index says it holds{_MEND}")


def read_names(file: Path) -> list[str]:
    """The names of a safetensors file's tensors. Raises LoadError if it is not whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file.name} is not a whole safetensors file ({error!s:.120}){_MEND}") from None


def _check_bin(file: Path) -> None:
    """A file of torch.save is a zip archive whose table of contents comes last, so that a cut one has none.

    Those of torch before 1.6 are bare pickles; whether they are whole shows when they are loaded.
    """
    with file.open("rb") as opened:
        start = opened.read(2)
    if start == b"PK" and not zipfile.is_zipfile(file):
        raise LoadError(f"{file.name} is not a whole file of torch.save: its end is missing{_MEND}")
    if start != b"PK" and start[:1] != b"\x80":
        raise LoadError(f"{file.name} is no file of torch.save{_MEND}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
