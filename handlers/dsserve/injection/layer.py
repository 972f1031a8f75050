"""One of DeepSpeed's layers where transformers expects one of its own.

transformers calls a layer by the forward signature of its class, which changes from version to version; DeepSpeed's
layer has a signature of its own. The adapter takes from a call what the kernels understand (hidden states, mask,
alibi), reports their token count to the cache, and returns what the original class returned. Does not change what the
layers compute (`repairs`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from dsserve.injection.mask import additive, as_ones, in_window
from dsserve.injection.workspace import Workspace

_CACHES = ("past_key_values", "layer_past", "past_key_value")


@dataclass(frozen=True)
class LayerCall:
    """How transformers calls a layer.

    Attributes:
        names: the parameters of the class's forward, in order, without self.
        returns_tuple: `(hidden states, ...)` instead of the hidden states.
    """

    names: tuple[str, ...]
    returns_tuple: bool

    @classmethod
    def of(cls, layer_class: type[nn.Module], returns_tuple: bool) -> LayerCall:
        return cls(tuple(inspect.signature(layer_class.forward).parameters)[1:], returns_tuple)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass
class PassState:
    """What all layers of one forward pass share: the masks, converted once."""

    workspace: Workspace
    wants_ones: bool = False
    _mask: Any = None
    _converted: Any = field(default=None)
    _local: dict[int, Any] = field(default_factory=dict)

    def mask(self, mask: torch.Tensor | None, hidden: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """The kernels' form of a mask; see `additive` and `in_window`."""
        whole = self._whole(mask, hidden)
        if window is None:
            return whole
        if window not in self._local:
            self._local[window] = in_window(whole, window, self.workspace.tokens, hidden)
        return self._local[window]

    def _whole(self, mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
        if mask is None:
            return None
        if mask is not self._mask:
            converted = additive(mask, hidden.shape[0], self.workspace.tokens, hidden.dtype)
            self._mask, self._converted = mask, as_ones(converted) if self.wants_ones else converted
        return self._converted

    def forget(self) -> None:
        """A new pass begins."""
        self._mask = self._converted = None
        self._local.clear()


class InjectedLayer(nn.Module):
    """The adapter of one layer.

    Args:
        kernels: DeepSpeed's layer.
        window: of a layer with local attention, in tokens.
    """

    def __init__(self, kernels: Any, call: LayerCall, state: PassState, is_first: bool, window: int | None) -> None:
        super().__init__()
        self.kernels = kernels
        self._call = call
        self._state = state
        self._is_first = is_first
        self._window = window

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that it stands for.

        Raises:
            WorkspaceError: see `Workspace.begin`.
            ValueError: see `additive`.
        """
        call = self._call.bind(args, kwargs)
        hidden: torch.Tensor = call["hidden_states"]
        if self._is_first:
            self._state.workspace.begin(hidden, self._cache(call))
            self._state.forget()
        mask = self._state.mask(call.get("attention_mask"), hidden, self._window)
        output = self.kernels(hidden, attention_mask=mask, alibi=call.get("alibi"))
        hidden = output[0] if isinstance(output, tuple) else output
        return (hidden, None) if self._call.returns_tuple else hidden

    @staticmethod
    def _cache(call: dict[str, Any]) -> Cache | None:
        return next((call[name] for name in _CACHES if call.get(name) is not None), None)


class _Probed(Exception):
    """The first layer has answered."""


def probe_returns_tuple(model: Any, layer: nn.Module) -> bool:
    """Whether a layer of the untouched model returns a tuple: runs the model up to it, with two tokens."""
    found: list[bool] = []

    def look(_: Any, __: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise _Probed

    hook = layer.register_forward_hook(look)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    except _Probed:
        pass
    finally:
        hook.remove()
    return found[0]
