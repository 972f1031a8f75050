"""TorchServe's context of a load, made without its frontend: for ranks that load a model under no server."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ts.context import Context


def make_context(name: str, model_dir: Path | str, yaml_config: dict[str, Any], batch_size: int = 1) -> Context:
    """A real `ts.context.Context` with the content of a model-config.yaml."""
    server = version("torchserve")
    return Context(name, str(model_dir), None, batch_size, None, server, model_yaml_config=yaml_config)
