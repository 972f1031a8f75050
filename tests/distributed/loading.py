"""What the ranks do for `test_load_errors`: the handler's load of one folder after the other."""

from __future__ import annotations

import deepspeed_handler
from dsserve.errors import LoadError
from tests.contexts import make_context
from tests.tiny_models import settings


def reasons(folders: dict[str, str]) -> dict[str, str]:
    """Name of a model's folder -> why it is not served; empty where it is."""
    return {name: _reason(folder) for name, folder in folders.items()}


def _reason(folder: str) -> str:
    try:
        deepspeed_handler.DeepSpeedHandler().initialize(make_context(folder, settings(folder, warmup=False)))
    except LoadError as error:
        return str(error)
    return ""
