"""Finds and loads a Hugging Face causal language model with its tokenizer.

Weights are pages of their files (mmap), which cost no memory of a rank's own until `ds_engine` has cut them. Proves
that the files hold all weights. Does not shard and does not generate.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsserve.config.handler import YAML_FILE, HandlerConfig
from dsserve.core.errors import LoadError, first_line
from dsserve.loading.end_of_text import end_ids, warn_of_extra_tokens
from dsserve.loading.load_failure import is_of_the_machine
from dsserve.loading.model_kind import check_config, check_folder, check_head, check_states, describe_headless
from dsserve.loading.quantized_files import refuse_quantized_files
from dsserve.loading.weight_files import check_weight_files, find_weight_files

logger = logging.getLogger(__name__)

# Of a hub id: what a model needs, in safetensors; its .bin files only where it has no others.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
_HUB_BIN = ("pytorch_model*.bin",)


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU in its own dtype, its tokenizer, and the token ids that end a text."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    max_position: int | None


def locate_model(config: HandlerConfig, model_dir: Path) -> Path:
    """The folder of the model: `handler.model_path`, or the hub id's, downloaded where the hub's cache lacks it.

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count as everywhere.

    Raises:
        LoadError: a path that is no folder, a folder without config.json, or a model that cannot be downloaded.
    """
    name = config.model_path
    folder = Path(name) if Path(name).is_absolute() else model_dir / name
    if not folder.exists() and _looks_like_hub_id(name):
        folder = _download(config)
    elif not folder.exists():
        raise LoadError(
            f"{YAML_FILE}: handler.model_path: no folder {name}; give an absolute path, a path relative to the "
            "model folder, or a hub id"
        )
    try:
        check_folder(folder, name)
    except LoadError as error:
        raise LoadError(f"{YAML_FILE}: handler.model_path: {error}") from None
    return folder


def _download(config: HandlerConfig) -> Path:
    """The hub's snapshot. Ranks that call it at the same time wait for each other at each file."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(config.model_path, revision=config.revision, allow_patterns=list(patterns)))

    with _loading(config):
        folder = fetch(_HUB_FILES)
        return folder if any(folder.glob("*.safetensors")) else fetch(_HUB_BIN)


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def load_outline(config: HandlerConfig, folder: Path) -> Any:
    """The model on the meta device, without weights: enough to refuse a shape before the long load, and to be filled
    from a shard cache.

    Raises:
        LoadError: weights that are quantized already, or a model that transformers cannot make.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    trust = {"trust_remote_code": config.trust_remote_code}
    with _loading(config):
        model_config = AutoConfig.from_pretrained(folder, **trust)
        _refuse_quantized(model_config)
        refuse_quantized_files(folder)
        check_config(model_config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=model_config.dtype or torch.float32, **trust)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        check_states(model)
        check_head(model, folder)
    return model.eval()


def _refuse_quantized(model_config: Any) -> None:
    """GPTQ, AWQ, FP8 and the like: AutoTP would cut packed integers and scales as if they were weights."""
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise LoadError(
        f"the weights are quantized with {getattr(method, 'value', method)} (quantization_config in config.json), "
        "which cannot be sharded here; name the model's unquantized weights"
    )


def load_model(config: HandlerConfig, folder: Path, outline: Any = None) -> LoadedModel:
    """Loads model and tokenizer.

    Args:
        outline: what `load_outline` made, to be filled later: its weights are not read from `folder`.

    Raises:
        LoadError: weights that are missing, incomplete or damaged, or that transformers cannot load.
    """
    from transformers import AutoTokenizer

    model = load_weights(config, folder) if outline is None else outline
    with _loading(config), _tokenizer_packages_named(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    warn_of_extra_tokens(model, tokenizer)
    return LoadedModel(model, tokenizer, end_ids(model, tokenizer), max_position(model.config))


@contextlib.contextmanager
def _tokenizer_packages_named(folder: Path) -> Iterator[None]:
    """transformers asks for tiktoken where SentencePiece's package is missing, and the other way round."""
    try:
        yield
    except Exception as error:
        if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
            raise
        raise LoadError(
            f"tokenizer.model cannot be read ({first_line(error):.200}): SentencePiece's files need the packages "
            "sentencepiece and protobuf, tiktoken's the package tiktoken; or save the tokenizer as tokenizer.json"
        ) from error


def load_weights(config: HandlerConfig, folder: Path) -> Any:
    """The model in its own dtype, all of whose weights stood in the files. Raises LoadError, see `load_model`."""
    from transformers import AutoModelForCausalLM

    with _loading(config):
        files = find_weight_files(folder)
        check_weight_files(files)
        logger.info("[dsserve] weights: %d file(s), %.2f GiB", len(files.files), files.total_bytes / 2**30)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=config.trust_remote_code,
        )
    with _loading(config):
        _check_names(info, model)
    return model.eval()


def _check_names(info: dict[str, Any], model: Any) -> None:
    """transformers gives random values to what is missing or of another shape, with a warning; that is never served."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [f"{name} is {list(found)} and not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    mend = "download or save the model again, or correct config.json"
    if missing:
        headless = describe_headless(model) if all("head" in name or "output" in name for name in missing) else None
        raise LoadError(
            headless
            or f"the weight files lack {len(missing)} tensor(s) of the model ({', '.join(missing[:5])}): {mend}"
        )
    if shapes:
        raise LoadError(f"the weight files hold {len(shapes)} tensor(s) of another shape ({shapes[0]}): {mend}")
    if unexpected:
        logger.warning("[dsserve] %d tensor(s) in the files are no part of the model: %s", len(unexpected), unexpected)


@contextlib.contextmanager
def _loading(config: HandlerConfig) -> Iterator[None]:
    """Turns what transformers raises into one line that names the key."""
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{YAML_FILE}: handler.model_path: {config.model_path}: {error}") from None
    except Exception as error:
        if is_of_the_machine(error):
            raise
        reason = f"{type(error).__name__}: {error}"[:400]
        raise LoadError(
            f"{YAML_FILE}: handler.model_path: {config.model_path} could not be loaded: {reason}"
        ) from error


def max_position(model_config: Any) -> int | None:
    """The model's context in tokens, if its config names one."""
    text_config = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int):
            return value
    return None
