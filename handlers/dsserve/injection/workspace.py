"""The kernels' one workspace of a process: its size, and what of it is in use.

The kernels check nothing: a batch or a length beyond what was taken is an illegal memory access. Every forward pass is
checked here instead, in its first layer, on the host. Does not decide which requests form a batch (`engine`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from dsserve.core.errors import LoadError
from dsserve.injection.cache import count_tokens

# inference_context.h: the cache begins behind 10 times a token's hidden values of one rank.
_ACTIVATIONS = 10
_INT32 = 2**31


class WorkspaceError(RuntimeError):
    """A forward pass that the kernels cannot do: too many rows or tokens, or not the batch they hold."""


@dataclass(frozen=True)
class WorkspaceSize:
    """What is taken at load.

    Attributes:
        rows: the largest batch.
        tokens: prompt + output of a row.
        taken_rows: rows that the kernels are told: more where activations would reach into the cache.
    """

    rows: int
    tokens: int
    taken_rows: int

    @classmethod
    def plan(cls, rows: int, tokens: int, config: Any) -> WorkspaceSize:
        """For layers with DeepSpeed's config `config`.

        A prompt's activations lie in front of the cache, in room for 10 times the hidden values *of a rank*, while some
        of them are whole on every rank, and a wide MLP's are more: `rows` whole prompts then overwrite the first
        layer's keys. More rows make more room.

        Raises:
            LoadError: scores of a batch of whole prompts that the softmax kernel cannot count (32 bits).
        """
        hidden, ranks = config.hidden_size, config.mp_size
        gate = 2 if config.mlp_act_func_type in _gated() else 1
        mlp = 3 * hidden + gate * config.intermediate_size // ranks
        needed = max(mlp, 4 * hidden, 3 * hidden // ranks, 6 * hidden // ranks)
        taken = rows * max(1, needed / (_ACTIVATIONS * hidden // ranks))
        scores = rows * (config.heads // ranks) * tokens**2
        if scores >= _INT32:
            most = math.isqrt((_INT32 - 1) // (rows * (config.heads // ranks)))
            raise LoadError(
                f"max_out_tokens {tokens} with batches of {rows}: the kernels count scores in 32 bits; lower "
                f"max_out_tokens to {most}, or handler.max_running"
            )
        return cls(rows, tokens, math.ceil(taken))


def _gated() -> list[Any]:
    from deepspeed.utils.types import GATED_ACTIVATION_TYPES

    return list(GATED_ACTIVATION_TYPES)


class Workspace:
    """Takes the memory, and follows the batch that the kernels hold.

    Args:
        layers: DeepSpeed's layers, in order.
    """

    def __init__(self, layers: list[Any], size: WorkspaceSize) -> None:
        self.size = size
        self.tokens = 0
        self._batch = 0
        self._layers = layers
        config = layers[0].config
        config.min_out_tokens = config.max_out_tokens = size.tokens  # all of it or an error, never less
        try:
            layers[0].allocate_workspace((size.taken_rows, size.tokens, config.hidden_size))
        except RuntimeError as error:
            raise LoadError(
                f"the kernels' workspace for {size.rows} rows of {size.tokens} tokens does not fit into memory "
                f"({error}); lower handler.max_running or deepspeed.max_out_tokens"
            ) from error

    def begin(self, hidden: torch.Tensor, cache: Cache | None) -> None:
        """Enters a forward pass of `[B, S, H]`: a new batch where `cache` holds nothing, else one token of each row.

        Raises:
            WorkspaceError: it does not fit, or it does not go on where the kernels are.
        """
        batch, new = hidden.shape[:2]
        held = 0 if cache is None else int(cache.get_seq_length())
        if batch > self.size.rows or held + new > self.size.tokens:
            raise WorkspaceError(
                f"{batch} rows of {held + new} tokens: the kernels' workspace has {self.size.rows} rows of "
                f"{self.size.tokens} (handler.max_running or batchSize, deepspeed.max_out_tokens)"
            )
        if held == 0:
            self._layers[0].reset_cache()  # else a prompt of one token would go on with the last batch
            for layer in self._layers:
                layer.layer_past = None
            self._batch = batch
        elif (held, batch) != (self.tokens, self._batch) or new != 1:
            raise WorkspaceError(
                f"{new} token(s) for {batch} rows after {held}: the kernels hold {self._batch} rows of {self.tokens} "
                "tokens and go on by one token only; a new batch needs a new cache"
            )
        self.tokens = held + new
        if cache is not None:
            count_tokens(cache, new, hidden)
