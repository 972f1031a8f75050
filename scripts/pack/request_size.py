"""TorchServe's limits of bodies. A request's follows from the model's context: what cannot fit is refused unread.

Only the numbers; `run_dir` writes them into config.properties.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.model.facts import context_of

# A token is some 4 characters of text, up to 12 bytes a character where JSON escapes it, 7 as a number in a list; a
# body may hold several prompts, and schemas or tools beside them.
BYTES_A_TOKEN = 128
LEAST_BYTES = 2**20
TORCHSERVES_OWN = 6_553_500
# TorchServe drops a worker's connection, and every stream with it, for an item above its limit (6,553,500 bytes by
# default). The handler refuses at half of this, when it reads a request.
MAX_RESPONSE_BYTES = 64 * 2**20


def max_request_bytes(config: Mapping[str, Any]) -> int:
    """Most bytes of a body, from a model-config.yaml; TorchServe's own default where the context is not known."""
    handler = config.get("handler") or {}
    context = handler.get("max_model_len") or context_of(Path(str(handler.get("model_path", ""))))
    if not isinstance(context, int):
        return TORCHSERVES_OWN
    return max(LEAST_BYTES, BYTES_A_TOKEN * context)
