"""TorchServe's context object, made without TorchServe's frontend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ts.context import Context

from scripts.common.context import make_context as make


def make_context(model_dir: Path | str, yaml_config: dict[str, Any], batch_size: int = 1024) -> Context:
    """A real `ts.context.Context` for a load."""
    return make("test", model_dir, yaml_config, batch_size)
