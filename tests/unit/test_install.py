"""The package as users install it, outside this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def is_installed() -> bool:
    try:
        return bool(version("deepspeed-torchserve-handlers"))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not is_installed(), reason="this Python was named by PYTHON=, and nothing is installed into it")
def test_the_public_names_can_be_imported_anywhere(tmp_path: Path) -> None:
    code = "from dsserve import BaseDeepSpeedHandler, get_ds_engine; print(BaseDeepSpeedHandler.__mro__[1].__module__)"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "ts.torch_handler.distributed.base_deepspeed_handler"
