"""What a load makes of a model: this rank's part of it, and what is known of that part. Made by `ds_engine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsserve.injection.workspace import Workspace
from dsserve.modeling.self_check import SelfCheck


@dataclass(frozen=True)
class ShardedModel:
    """A model that is cut over the ranks and proven.

    Attributes:
        engine: DeepSpeed's `InferenceEngine`.
        self_check: the reference logits (those of the quantized weights with `deepspeed.quantization`); None where the
            check is off, the model is no causal language model or came on the meta device without a cache.
        workspace: the kernels' memory with kernel injection, else None.
        injection_refused: why `replace_with_kernel_inject: auto` chose AutoTP; None where it did not.
    """

    engine: Any
    self_check: SelfCheck | None = None
    workspace: Workspace | None = None
    injection_refused: str | None = None

    @property
    def module(self) -> Any:
        """The model itself, this rank's part."""
        return self.engine.module
