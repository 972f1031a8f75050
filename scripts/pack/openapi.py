"""Write the OpenAPI description of the endpoints to configs/openapi.json; servers offer it at `v1/openapi.json`."""

from __future__ import annotations

import json

from dsserve.protocol.openai.openapi import describe
from scripts.common.paths import ROOT

OPENAPI_FILE = ROOT / "configs" / "openapi.json"


def render() -> str:
    """The file's text."""
    return json.dumps(describe(), indent=2) + "\n"


if __name__ == "__main__":
    OPENAPI_FILE.write_text(render(), encoding="utf-8")
