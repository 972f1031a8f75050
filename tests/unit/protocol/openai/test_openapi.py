"""The description of the endpoints is valid, complete and the one that is shipped."""

from __future__ import annotations

import json

from dsserve.protocol.openai.openapi import describe
from dsserve.protocol.openai.schema import ChatBody
from dsserve.protocol.routes import PATHS
from scripts.pack.openapi import OPENAPI_FILE, render


def test_the_shipped_file_is_what_the_server_offers() -> None:
    assert OPENAPI_FILE.read_text(encoding="utf-8") == render(), "run python -m scripts.pack.openapi"


def test_every_path_is_described_and_every_reference_leads_somewhere() -> None:
    document = describe()
    described = {path.removeprefix("/1.0/").removeprefix("/") for path in document["paths"]}
    assert described | {"v1/openapi.json"} == set(PATHS)
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]


def test_a_body_is_described_with_its_ranges() -> None:
    chat = describe()["components"]["schemas"]["ChatBody"]["properties"]
    assert set(chat) == set(ChatBody.model_fields)
    assert (chat["temperature"]["minimum"], chat["temperature"]["maximum"]) == (0, 2)
