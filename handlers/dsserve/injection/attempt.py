"""`shard_model`'s way with kernel injection: refuse, inject, prove; with `auto`, AutoTP instead where that fails.

All ranks decide alike. `true` never falls back. What falls back gets its own layers back: they are kept, untouched,
until the kernels are proven, which costs a GPU's host no memory (pages of the weights' files, or the model that was
given). Does not shard (`ds_engine`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dsserve.core.errors import LoadError
from dsserve.injection.inject import check_injection, find_layers, inject_kernels
from dsserve.injection.op import load_op
from dsserve.injection.verify import verify_kernels
from dsserve.injection.workspace import Workspace
from dsserve.modeling import self_check
from dsserve.modeling.dtype import convert_parameters
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo

if TYPE_CHECKING:
    from dsserve.config.deepspeed import DeepSpeedSettings

logger = logging.getLogger(__name__)

# What DeepSpeed's injection raises on a version of transformers that it does not know, and its kernels on a GPU that
# they were not compiled for.
_FAULTS = (AttributeError, TypeError, LookupError, ValueError, RuntimeError)


class KernelInjection:
    """One attempt. `is_possible` first, then `inject`.

    Attributes:
        refusal: why the kernels do not serve (with `auto`); None as long as nothing speaks against them.
    """

    def __init__(self, settings: DeepSpeedSettings, rank: RankInfo, device: torch.device) -> None:
        self._settings = settings
        self._rank = rank
        self._device = device
        self.refusal: str | None = None

    def is_possible(self, model: Any) -> bool:
        """Judges by the model's config (the meta device will do) and by the machine, and loads the kernels.

        Raises:
            LoadError: the reason and the mend, in one line; not with `auto`, which answers False.
        """
        with self._deciding():
            check_injection(model, self._settings, self._device)
            load_op()
        return self.refusal is None

    def inject(
        self, model: Any, rows: int, check: SelfCheck | None, init_inference: Callable[[Any, dict[str, Any]], Any]
    ) -> tuple[Any, Workspace] | None:
        """DeepSpeed's engine with proven kernels and their workspace, or None: `model` is as it was, for AutoTP.

        Args:
            rows: the largest batch.
            check: what the untouched model answered; None = nothing is compared.

        Raises:
            LoadError: see `inject_kernels` and `verify_kernels`; not with `auto`.
        """
        originals, injected = Originals(model), None
        with self._deciding():
            injected = inject_kernels(model, self._settings.init, rows, init_inference)
            module = injected[0].module
            # DeepSpeed has converted what it took, a layer at a time: no rank holds a converted copy of the model.
            convert_parameters(module, self._settings.dtype)
            self_check.check_finite(module)
        if injected and self.refusal is None and check is not None:
            with self._deciding():
                error = verify_kernels(module, injected[1].size, check, self._device)
                if self._rank.is_leader:
                    logger.info("[dsserve] self-check: logits of the kernels differ by %.1e at most", error)
        if self.refusal is None:
            return injected
        injected = module = None  # its memory is free before AutoTP takes some
        originals.put_back(model)
        return None

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """With `auto` a rank's LoadError is every rank's refusal."""
        reason = None
        try:
            with _naming_faults():
                yield
        except LoadError as error:
            if not self._settings.may_fall_back:
                raise
            reason = str(error)
        if not self._settings.may_fall_back:
            return
        if not agree_on_least(int(reason is None), self._rank):
            self.refusal = reason or "another rank refused, see its log"
            if not self._rank.is_leader and reason:
                logger.warning("[dsserve] rank %d: %s", self._rank.rank, reason)


@contextmanager
def _naming_faults() -> Iterator[None]:
    try:
        yield
    except LoadError:
        raise
    except _FAULTS as error:
        first = next(iter(str(error).strip().splitlines()), "")[:300]
        raise LoadError(
            f"replace_with_kernel_inject: {type(error).__name__} in DeepSpeed's injection or kernels ({first}); set it "
            "to false (AutoTP)"
        ) from error


class Originals:
    """The layers that DeepSpeed replaces."""

    def __init__(self, model: Any) -> None:
        self._layers: dict[str, nn.Module] = {place: model.get_submodule(place) for place in find_layers(model)}

    def put_back(self, model: Any) -> None:
        """The model as it was, on the CPU; the kernels' workspace goes with DeepSpeed's next engine."""
        for place, layer in self._layers.items():
            parent, _, name = place.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        vars(model).pop("generate", None)
        model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
