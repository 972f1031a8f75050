"""TorchServe handlers that serve Hugging Face models with DeepSpeed-Inference tensor parallelism.

The two public names are what a handler of one's own needs; everything else is the ready handler's inside.
They are imported on first use: DeepSpeed reads the environment when it is imported, and
`dsserve.parallel.rank` has to prepare that environment first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsserve.loading.ds_engine import get_ds_engine
    from dsserve.worker.base_handler import BaseDeepSpeedHandler

__all__ = ["BaseDeepSpeedHandler", "get_ds_engine"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "BaseDeepSpeedHandler":
        from dsserve.worker.base_handler import BaseDeepSpeedHandler

        return BaseDeepSpeedHandler
    if name == "get_ds_engine":
        from dsserve.loading.ds_engine import get_ds_engine

        return get_ds_engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
