"""TorchServe's context object, made without TorchServe's frontend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ts.context import Context


def make_context(model_dir: Path | str, yaml_config: dict[str, Any], batch_size: int = 96) -> Context:
    """A real `ts.context.Context` for a load."""
    return Context("test", str(model_dir), None, batch_size, None, "0.12.0", model_yaml_config=yaml_config)
