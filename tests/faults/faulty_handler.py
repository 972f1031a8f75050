"""The served handler with faults that a file switches on, rank by rank. Packed by the fault tests only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import deepspeed_handler
from dsserve.runner.activation_memory import PrefillMemory

FAULTS = "faults"


class FaultyHandler(deepspeed_handler.DeepSpeedHandler):
    """Reads `<run directory>/faults/<rank>`: `raise`, `sleep <seconds>`, `step <seconds>` (within the model), or
    `memory <tokens>`: this rank has no room for a prefill of more."""

    def initialize(self, ctx: Any) -> None:
        PrefillMemory.is_limited = True  # type: ignore[assignment,method-assign]
        PrefillMemory.has_room = lambda _, tokens, logits: self._has_room(tokens)  # type: ignore[method-assign]
        PrefillMemory._learn = lambda _, tokens: None  # type: ignore[method-assign]
        super().initialize(ctx)

    def _read_fault(self) -> tuple[Path, str, str]:
        path = Path(os.environ["DSSERVE_RUN_DIR"], FAULTS, str(self.rank.rank))
        try:
            word, _, number = path.read_text().partition(" ")
        except FileNotFoundError:  # also where it goes at this very moment
            word = number = ""
        return path, word, number

    def _has_room(self, tokens: int) -> bool:
        _, word, number = self._read_fault()
        return word != "memory" or tokens <= int(number)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        path, word, number = self._read_fault()
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
