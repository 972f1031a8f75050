"""The JSON body of `POST /predictions/<model>`, the plain endpoint. OpenAI's bodies are `protocol.openai.schema`'s."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsserve.protocol.bounds import MESSAGES
from dsserve.protocol.fields import Body, Count, Quick, SamplingBody, explain

# What other servers and upstream's example call things.
_OTHER_NAMES = {
    "max_tokens": "did you mean max_new_tokens?",
    "max_completion_tokens": "did you mean max_new_tokens?",
    "max_length": "did you mean max_new_tokens?",
    "inputs": "did you mean prompt?",
    "input": "did you mean prompt?",
    "text": "did you mean prompt?",
    "stop_sequences": "did you mean stop?",
    "random_seed": "did you mean seed?",
    "manual_seed": "did you mean seed?",
    "do_sample": "did you mean temperature?",
}


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateBody(SamplingBody):
    """A request for text: `prompt` or `messages`, and how to generate."""

    prompt: str | None = Field(None, min_length=1, description="text; give this or `messages`")
    messages: Quick[Message] | None = Field(
        None,
        min_length=1,
        max_length=MESSAGES.most,
        description="turns with `role` (`system`, `user`, `assistant`) and `content`",
    )
    max_new_tokens: Count | None = Field(
        None,
        ge=1,
        description="new tokens, at most `handler.max_new_tokens_limit`; default: `handler.max_new_tokens`, cut to the "
        "room in the context",
    )
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False, description="0 (below 1e-5) = greedy")
    stream: bool = Field(False, description="server-sent events instead of one reply")

    @model_validator(mode="after")
    def _one_source(self) -> GenerateBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of `prompt` (a string) and `messages` (a list of role and content)")
        return self


def parse_body(body: str | dict[str, Any]) -> GenerateBody | str:
    """Checks a JSON body; a plain prompt passes through.

    Raises:
        RequestError: 400; names the parameter and what is allowed.
    """
    if isinstance(body, str):
        return body
    try:
        return GenerateBody.model_validate(body)
    except ValidationError as error:
        raise explain(error, list(GenerateBody.model_fields), _OTHER_NAMES) from None
