"""Finds and loads a Hugging Face causal language model with its tokenizer.

Loads whole models into host memory, in every rank; `ds_engine` shards them. Does not generate.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsserve.config import YAML_FILE, HandlerConfig
from dsserve.errors import LoadError

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU in its own dtype, its tokenizer, and the token ids that end a text."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    max_position: int | None


def resolve_model_path(config: HandlerConfig, model_dir: Path) -> str:
    """The folder of the weights, or the hub id as it stands.

    Raises:
        LoadError: a path that is no folder, or a folder without config.json or weights.
    """
    name = config.model_path
    folder = Path(name) if Path(name).is_absolute() else model_dir / name
    if not folder.is_dir():
        if _looks_like_hub_id(name):
            return name
        raise LoadError(
            f"{YAML_FILE}: handler.model_path: no folder {name}; give an absolute path, a path relative to the "
            "model folder, or a hub id"
        )
    if not (folder / "config.json").is_file():
        raise LoadError(
            f"{YAML_FILE}: handler.model_path: {name} holds no config.json; name a Hugging Face model folder"
        )
    if not any(True for pattern in _WEIGHT_PATTERNS for _ in folder.glob(pattern)):
        raise LoadError(f"{YAML_FILE}: handler.model_path: {name} holds no weights (*.safetensors or *.bin)")
    return str(folder)


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def load_model(config: HandlerConfig, model_dir: Path) -> LoadedModel:
    """Loads model and tokenizer.

    Raises:
        LoadError: see `resolve_model_path`; also where transformers cannot load what is there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, source = resolve_model_path(config, model_dir), _source(config)
    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", low_cpu_mem_usage=True, **source)
    model.eval()
    return LoadedModel(model, tokenizer, _eos_ids(model, tokenizer), _max_position(model.config))


def load_outline(config: HandlerConfig, model_dir: Path) -> Any:
    """The model on the meta device, without weights: enough to refuse a shape before the long load.

    Raises:
        LoadError: as `load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path, source = resolve_model_path(config, model_dir), _source(config)
    with _loading(config), torch.device("meta"):
        model_config = AutoConfig.from_pretrained(path, **source)
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)


def _source(config: HandlerConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


@contextlib.contextmanager
def _loading(config: HandlerConfig) -> Iterator[None]:
    """Turns what transformers raises into one line that names the key."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        raise LoadError(
            f"{YAML_FILE}: handler.model_path: {config.model_path} could not be loaded: {reason}"
        ) from error


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """All end-of-text ids of generation_config.json, else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _max_position(model_config: Any) -> int | None:
    text_config = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int):
            return value
    return None


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32
