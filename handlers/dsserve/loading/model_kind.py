"""What a folder or a model is, where it is no causal language model in Hugging Face's format: said before the load.

Looks at the names of files and tensors, config.json and the class that transformers makes of it. Reads no weights.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from dsserve.core.errors import LoadError
from dsserve.loading.weight_files import find_weight_files, read_names

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
_SERVED = "only causal language models are served (text in, text out)"
# Heads of other tasks in the names of `architectures`. Their files may still load: a language model's head can be tied.
_OTHER_TASK = re.compile(
    r"For(Sequence|Token|Audio|Image|Video)Classification|ForQuestionAnswering|ForMultipleChoice|ForMaskedLM|"
    r"ForNextSentencePrediction|ForPreTraining|ForRetrieval|ForTextEncoding|RewardModel"
)
# Layers of `layer_types` that keep a state instead of keys and values.
_RECURRENT = re.compile(r"linear|mamba|conv|recurrent|ssm|rwkv|delta", re.IGNORECASE)
# transformers' tables of classes, the first that has the model says what it is.
_KINDS = {
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_CTC_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a vision-language model",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder model",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "an encoder",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES": "an encoder",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "an image model",
    "MODEL_FOR_IMAGE_MAPPING_NAMES": "an image model",
}


def check_folder(path: Path, name: str) -> None:
    """Refuses what is no folder with a config.json, by what it is instead.

    Args:
        name: the path as the settings have it.

    Raises:
        LoadError: the kind of folder or file, and how to get one that is served.
    """
    if path.is_file():
        raise LoadError(f"{name} is {_describe_file(path)}; name a folder with config.json and model.safetensors")
    if not (path / "config.json").is_file():
        raise LoadError(f"{name} holds no config.json: {_describe_folder(path)}")
    if (path / ADAPTER).is_file():
        logger.warning(
            "[dsserve] %s lies beside the model's config.json: the adapter is not applied, the model is served as its "
            "own weights are; merge it (peft: merge_and_unload) to serve it", ADAPTER,
        )  # fmt: skip


def _describe_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return "a GGUF file (llama.cpp's format), which is not served"
    return "a file"


def _describe_folder(path: Path) -> str:
    if (path / ADAPTER).is_file():
        return (
            f"it is a PEFT adapter (LoRA and its like) of {_base_model(path)}; merge it into that model (peft: "
            "merge_and_unload, then save_pretrained) and name the merged folder"
        )
    if (path / "params.json").is_file():
        return (
            "it is a model in its maker's own format (params.json, consolidated files); name the folder or hub id in "
            "Hugging Face's format, or convert it with transformers' convert_<model>_weights_to_hf"
        )
    if (path / "model_index.json").is_file():
        return f"it is a diffusion pipeline (model_index.json); {_SERVED}"
    if files := sorted(file.name for file in path.glob("*.gguf")):
        return f"{files[0]} is in GGUF (llama.cpp's format), which is not served; name the model's safetensors folder"
    return "name a Hugging Face model folder"


def _base_model(path: Path) -> str:
    try:
        return f"{json.loads((path / ADAPTER).read_text('utf-8'))['base_model_name_or_path']!r:.120}"
    except (OSError, ValueError, LookupError, TypeError):
        return "a base model"


def check_config(model_config: Any) -> None:
    """Refuses by config.json what is no causal language model.

    Raises:
        LoadError: what the model is instead.
    """
    from transformers import AutoModelForCausalLM

    has_own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    named = named_architecture(model_config)
    if has_own_code:
        return
    if _OTHER_TASK.search(named):
        raise LoadError(f"architectures in config.json is {named}, a model for another task; {_SERVED}")
    if type(model_config) not in AutoModelForCausalLM._model_mapping:
        kind = model_config.model_type
        raise LoadError(f"{named or kind} (model_type {kind} in config.json) is {_kind(kind)}; {_SERVED}")


def check_states(model: Any) -> None:
    """Refuses a model some of whose layers keep more than keys and values, such as recurrent states.

    Raises:
        LoadError: the architecture, and what says so.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    recurrent = sorted({str(kind) for kind in kinds if _RECURRENT.search(str(kind))})
    if recurrent or getattr(model, "_is_stateful", False):
        says = f" ({', '.join(recurrent)})" if recurrent else ""
        raise LoadError(
            f"{type(model).__name__} has layers that keep states of their own{says}, which this engine does not hold: "
            "it serves models all of whose layers keep keys and values alone; name one of those"
        )


def named_architecture(model_config: Any) -> str:
    """The class that saved the model, as config.json says; empty where it says nothing."""
    return str(next(iter(getattr(model_config, "architectures", None) or ()), ""))


def check_head(model: Any, folder: Path) -> None:
    """Refuses what another class saved without a language head, by the names in its files. A tied one needs none.

    Raises:
        LoadError: see `describe_headless`.
    """
    reason, head = describe_headless(model), model.get_output_embeddings()
    if reason is None or head is None or model.config.get_text_config().tie_word_embeddings:
        return
    try:
        files = find_weight_files(folder)
    except LoadError:  # a shard cache alone
        return
    names = set(files.index) or (set(read_names(files.files[0])) if files.is_safetensors else set())
    path = next((path for path, module in model.named_modules() if module is head), "head")
    # transformers renames some tensors: what may be a head counts as one, until the load has looked at all names.
    heads = (path.rpartition(".")[2], "head", "output")
    if names and not any(word in name for name in names for word in heads):
        raise LoadError(reason)


def describe_headless(model: Any) -> str | None:
    """Why the files of a model lack its language head: they were saved by another class. None = they were not."""
    named = named_architecture(model.config)
    if not named or named == type(model).__name__:
        return None
    return (
        f"architectures in config.json is {named}, whose weights have no language head as {type(model).__name__} has: "
        f"an embedding model, a classifier or its like; {_SERVED}"
    )


def _kind(model_type: str) -> str:
    from transformers.models.auto import modeling_auto

    for table, kind in _KINDS.items():
        if model_type in getattr(modeling_auto, table, {}):
            return kind
    return "no causal language model that transformers knows"
