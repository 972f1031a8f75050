"""Write the tables of docs/api.md from the models that check the requests."""

from __future__ import annotations

from dsserve.protocol.fields import SamplingBody
from dsserve.protocol.openai.schema import ChatBody, CompletionBody, V1Body
from dsserve.protocol.openai.tokenizer_endpoints import DetokenizeBody, TokenizeBody
from dsserve.protocol.schema import GenerateBody
from scripts.docs.page_tables import DOCS, field_table, write

PAGE = DOCS / "api.md"
SHARED = set(SamplingBody.model_fields)


def tables() -> dict[str, str]:
    """Each mark's table. What several bodies share stands once; a body's own table has what it adds or changes."""
    v1 = set(V1Body.model_fields) - SHARED
    return {
        "sampling": field_table(SamplingBody, "parameter"),
        "plain": field_table(GenerateBody, "parameter", set(GenerateBody.model_fields) - SHARED | {"temperature"}),
        "v1": field_table(V1Body, "parameter", v1),
        "completions": field_table(CompletionBody, "parameter", set(CompletionBody.model_fields) - SHARED - v1),
        "chat": field_table(ChatBody, "parameter", set(ChatBody.model_fields) - SHARED - v1),
        "tokenize": field_table(TokenizeBody, "parameter"),
        "detokenize": field_table(DetokenizeBody, "parameter"),
    }


if __name__ == "__main__":
    write(PAGE, tables())
