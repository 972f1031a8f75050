"""What config.json of a model's folder says of it, before anything is loaded. A hub id, or another folder: nothing."""

from __future__ import annotations

import json
from pathlib import Path

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_HEADS = ("num_attention_heads", "n_head", "num_heads")


def context_of(model: Path) -> int | None:
    """Most tokens of prompt and output."""
    return _number(model, _CONTEXT)


def attention_heads(model: Path) -> int | None:
    """Heads of a layer: no more ranks than these can share it."""
    return _number(model, _HEADS)


def _number(model: Path, names: tuple[str, ...]) -> int | None:
    try:
        found = json.loads((model / "config.json").read_text(encoding="utf-8"))
        found = {**found, **found.get("text_config", {})}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return next((found[name] for name in names if isinstance(found.get(name), int)), None)
