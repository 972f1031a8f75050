"""The JSON body of `POST /predictions/<model>`: its parameters, their types and ranges, and their error messages.

Everything that does not depend on the model; what does (context, chat template) is checked in `prompt`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dsserve.errors import RequestError

# What other servers and upstream's example call things -> our parameter.
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "inputs": "prompt",
    "input": "prompt",
    "text": "prompt",
    "stop_sequences": "stop",
    "random_seed": "seed",
    "manual_seed": "seed",
    "do_sample": "temperature",
}
_MAX_ECHO = 64


def _check_unicode(value: str) -> str:
    """JSON can spell a lone surrogate, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "not valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(_check_unicode)]
StopString = Annotated[Text, Field(min_length=1)]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class GenerateBody(BaseModel):
    """A request for text: `prompt` or `messages`, and how to generate."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Text | None = Field(None, min_length=1)
    messages: list[Message] | None = Field(None, min_length=1)
    max_new_tokens: StrictInt | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_k: StrictInt | None = Field(None, ge=-1)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: StrictInt | None = Field(None, ge=0, le=2**63 - 1)
    stop: list[StopString] = Field(default=[], max_length=4)
    stream: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("top_k")
    @classmethod
    def _top_k_off(cls, value: int | None) -> int | None:
        return None if value in (0, -1) else value

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
        raise _explain(error) from None


def _explain(error: ValidationError) -> RequestError:
    """pydantic's first complaint in the words of the API. Values of the client are not repeated."""
    first = error.errors(include_url=False, include_context=True)[0]
    location = [str(part)[:_MAX_ECHO] for part in first["loc"]]
    kind, name = first["type"], location[0] if location else None
    if kind == "value_error":
        return RequestError(str(first["ctx"]["error"]))
    if kind == "extra_forbidden" and len(location) == 1:
        return RequestError(_unknown(str(name)), param=name)
    where = ".".join(location)
    if kind == "extra_forbidden":
        return RequestError(f"{where}: unknown; a message holds `role` and `content`", param=name)
    if kind == "string_too_short":
        return RequestError(f"{where} must not be empty", param=name)
    if kind == "string_unicode":
        return RequestError(f"{where} is not valid Unicode: it holds a lone surrogate", param=name)
    if kind == "too_short":
        return RequestError(f"{where} must not be empty: give at least one", param=name)
    return RequestError(f"{where}: {first['msg']}", param=name)


def _unknown(name: str) -> str:
    allowed = ", ".join(GenerateBody.model_fields)
    meant = _OTHER_NAMES.get(name)
    return f"unknown parameter{f'; did you mean {meant}?' if meant else '.'} Allowed: {allowed}"
