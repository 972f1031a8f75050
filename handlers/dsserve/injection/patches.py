"""The one place where DeepSpeed's own classes are changed, for as long as an injection lasts. DeepSpeed 0.19.8.

Transposition: containers transpose the model's weights in place, so that pages of the weights' files become a second
copy of the model in each rank's own memory, and the untouched layers could not be put back. There is no setting.

BLOOM: its container refuses transformers above 4.43.4, in the constructor, because BLOOM's mask and cache changed
then. The adapters (`layer`) hand it the mask it wants and it keeps its own cache, so the refusal has lost its reason;
there is no setting for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def patched_deepspeed() -> Iterator[None]:
    """Within the block DeepSpeed injects BLOOM's layers whatever the version of transformers, and no weight is
    transposed in place."""
    from deepspeed.module_inject.containers.base import BaseTransformerContainer
    from deepspeed.module_inject.containers.bloom import DS_BloomContainer

    original, in_place = DS_BloomContainer.__init__, BaseTransformerContainer.transpose_impl

    def construct(self: Any, **kwargs: Any) -> None:
        super(DS_BloomContainer, self).__init__(**kwargs)
        self.bigscience_bloom = True
        self.triangular_masking = True

    DS_BloomContainer.__init__ = construct
    BaseTransformerContainer.transpose_impl = lambda _, data: data.transpose(-1, -2).contiguous()
    try:
        yield
    finally:
        DS_BloomContainer.__init__ = original
        BaseTransformerContainer.transpose_impl = in_place


def has_injected_model() -> bool:
    """Whether this process holds a model with kernels already: they have one workspace and one token counter."""
    from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference

    return DeepSpeedTransformerInference.workspace is not None


def forget_merge_buffers() -> None:
    """Frees what DeepSpeed's layers keep for training's split weights: two matrices of a layer that nothing reads."""
    from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention
    from deepspeed.ops.transformer.inference.ds_mlp import DeepSpeedMLP

    DeepSpeedSelfAttention._qkv_buffers = []
    DeepSpeedMLP._inter_w_buffers = []
