"""Variables of the environment that the scripts set and more than one package reads."""

from __future__ import annotations

RUN_DIR_VARIABLE = "DSSERVE_RUN_DIR"
