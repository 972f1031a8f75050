"""The served handler with faults that a file switches on, rank by rank. Packed by the fault tests only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import deepspeed_handler

FAULTS = "faults"


class FaultyHandler(deepspeed_handler.DeepSpeedHandler):
    """Reads `<run directory>/faults/<rank>`: `raise`, `sleep <seconds>` or `step <seconds>` (within the model)."""

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        path = Path(os.environ["DSSERVE_RUN_DIR"], FAULTS, str(self.rank.rank))
        word, _, number = path.read_text().partition(" ") if path.is_file() else ("", "", "")
        if word == "sleep":
            time.sleep(float(number))
        if word in ("raise", "step"):
            self.model.register_forward_pre_hook(lambda *_: self._break(path, number))
        return super().handle(data, context)

    def _break(self, path: Path, number: str) -> None:
        if not path.is_file():
            return
        if number:
            time.sleep(float(number))
        else:
            path.unlink()
            raise RuntimeError("a fault of the test")
