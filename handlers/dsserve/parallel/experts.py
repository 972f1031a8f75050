"""Experts that AutoTP leaves whole: transformers keeps them as 3-D parameters, and AutoTP cuts `nn.Linear` alone.

Each rank computes them for itself, which is exact and saves no memory. Only says so; cuts nothing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

# Below this share of the layers they are not worth a line: convolutions are 3-D, too.
_WORTH_A_LINE = 0.05
_IN_A_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class LayerWeights:
    """What a model's layers hold before they are cut.

    Attributes:
        numbers: of all parameters of the layers.
        experts: name -> shape of their parameters of three dimensions and more.
    """

    numbers: int
    experts: dict[str, torch.Size]

    @classmethod
    def of(cls, model: torch.nn.Module) -> LayerWeights:
        """Of a whole model, also on the meta device."""
        layers = _layers(model)
        experts = {name: parameter.shape for name, parameter in layers.items() if parameter.dim() > 2}
        return cls(sum(parameter.numel() for parameter in layers.values()), experts)

    def warn_of_whole_experts(self, module: torch.nn.Module, tp_size: int) -> None:
        """One line in the log where experts of the cut `module` are as large as before, with what a rank holds.

        Call it on one rank.
        """
        layers = _layers(module)
        whole = [name for name, shape in self.experts.items() if name in layers and layers[name].shape == shape]
        if tp_size == 1 or sum(layers[name].numel() for name in whole) < _WORTH_A_LINE * self.numbers:
            return
        held = sum(parameter.numel() for parameter in layers.values())
        logger.warning(
            "[dsserve] each of %d ranks holds %.0f %% of the layers' weights: experts are not cut over the ranks, so "
            "that more ranks save little memory", tp_size, 100 * held / self.numbers,
        )  # fmt: skip


def _layers(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if _IN_A_LAYER.search(name)}
