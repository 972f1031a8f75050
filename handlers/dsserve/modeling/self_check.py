"""Compares a model's logits before and after DeepSpeed has changed it, so that wrong sharding never serves a request.

The reference is the model itself as transformers runs it, in the dtype it is served in. Does not check speed and
does not compare with other weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.modeling.dtype import computing_in

LENGTH = 24
# Largest ||out - ref|| / ||ref|| over all positions that rounding explains in a model of 16 layers. It grows with the
# root of the layers: bf16, 24 layers of random weights, split rightly over two ranks: 4.5e-2 (limit 6.1e-2).
_LAYERS = 16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class SelfCheck:
    """Tokens and what the untouched model made of them.

    Attributes:
        token_ids: `[T]`, int64, on the CPU; the same on all ranks.
        logits: `[T, V]`, fp32, on the CPU.
        dtype: the dtype that the model is served in.
        limit: largest relative error that rounding explains.
        architecture: the model's class.
    """

    token_ids: torch.Tensor
    logits: torch.Tensor
    dtype: torch.dtype
    limit: float
    architecture: str = "this architecture"

    @classmethod
    def capture(cls, model: Any, dtype: torch.dtype, reference: torch.dtype | None = None) -> SelfCheck:
        """Runs `LENGTH` fixed tokens through the whole model, where it lies; large weights are converted a piece at a
        time and stay as they are.

        Args:
            dtype: what the model is served in.
            reference: what it computes in here, if not in that.
        """
        vocabulary = model.get_input_embeddings().weight.shape[0]
        token_ids = torch.randint(vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(0))
        # Parameters converted in inference mode could not be used outside it.
        with torch.no_grad(), computing_in(model, reference or dtype):
            logits = answers(model, token_ids)
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", _LAYERS)
        limit = TOLERANCE[dtype] * max(1.0, (layers / _LAYERS) ** 0.5)
        return cls(token_ids, logits.float().cpu(), dtype, limit, type(model).__name__)

    def until(self, length: int) -> SelfCheck:
        """The check of the first `length` tokens alone."""
        return replace(self, token_ids=self.token_ids[:length], logits=self.logits[:length])

    def error(self, logits: torch.Tensor) -> float:
        """`||logits - reference|| / ||reference||` for the last positions, logits `[at most T, V]`.

        Infinite where they are not finite."""
        reference = self.logits[-logits.shape[0] :]
        difference = torch.linalg.vector_norm(logits.float().cpu() - reference)
        relative = (difference / torch.linalg.vector_norm(reference)).item()
        return relative if math.isfinite(relative) else math.inf

    def verify(self, logits: torch.Tensor, what: str) -> float:
        """Returns the relative error of logits `[at most T, V]`, the last positions' ones.

        Raises:
            LoadError: it is above the limit.
        """
        relative = self.error(logits)
        if not relative <= self.limit:
            raise LoadError(
                f"self-check failed: {what} changed the logits by {relative:.2e} (limit {self.limit:.0e} in "
                f"{str(self.dtype).removeprefix('torch.')}); {self.architecture} is not served exactly this way. "
                "deepspeed.self_check: false in model-config.yaml switches the check off, not the fault"
            )
        return relative


def answers(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """What a model makes of tokens `[T]`: logits `[T, V]`, those of a classifier `[classes]`, or an encoder's last
    hidden states `[T, H]`."""
    cached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    output = model(input_ids=token_ids[None].to(model.device), **cached)
    logits = getattr(output, "logits", None)
    return (output.last_hidden_state if logits is None else logits)[0]


def check_finite(model: torch.nn.Module) -> None:
    """Raises LoadError, naming the tensors, if a parameter or buffer holds a NaN or an infinite number."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)]
    if broken:
        raise LoadError(
            f"{len(broken)} tensor(s) hold numbers that are not finite in {str(tensors[0][1].dtype)[6:]} "
            f"({', '.join(broken[:5])}): the file is damaged, or (fp16) they are too large: serve the model in bf16"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Without a second tensor of its size; NaN counts as least and as largest."""
    if not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def check_nothing_on_meta(model: torch.nn.Module) -> None:
    """Raises LoadError, naming the tensors, if a parameter or buffer has still no values."""
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise LoadError(
            f"after loading, {len(empty)} tensor(s) have no values ({', '.join(empty[:5])}); set deepspeed.checkpoint "
            "to load a model made on the meta device, or load it with from_pretrained"
        )
