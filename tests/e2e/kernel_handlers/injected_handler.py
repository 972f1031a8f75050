"""The served handler; on a CPU over the stand-in of DeepSpeed's kernels. Packed by the tests only."""

from __future__ import annotations

from typing import Any

import deepspeed_handler


class InjectedHandler(deepspeed_handler.DeepSpeedHandler):
    def _load(self, ctx: Any, *args: Any) -> None:
        if self.device.type == "cpu":
            from tests.programs.injection.kernels import install

            install()
        super()._load(ctx, *args)
