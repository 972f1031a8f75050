"""Phi-3's and Phi-4's fused attention: each layer is told how many query heads this rank has.

It finds the end of the queries in q/k/v by the config's number of heads, which is the whole model's after DeepSpeed's
split. The layer gets a config of its own; the model's stays as it is.
"""

from __future__ import annotations

import copy

from torch import nn


def use_rank_query_heads(module: nn.Module) -> None:
    """Corrects every Phi-3 attention layer of a sharded module, in place."""
    from transformers.models.phi3.modeling_phi3 import Phi3Attention

    for part in module.modules():
        if isinstance(part, Phi3Attention):
            part.config = copy.copy(part.config)
            part.config.num_attention_heads = part.o_proj.weight.shape[1] // part.head_dim
