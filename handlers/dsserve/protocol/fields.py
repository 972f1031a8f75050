"""What the bodies of all endpoints share: strict types, sampling parameters, stop conditions, errors in plain words.

Everything that does not depend on the model; what does (context, vocabulary, chat template) is checked in `prompt`.
What any JSON must be, valid Unicode for one, was checked before (`json_bounds`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
)
from pydantic import model_validator as checks_model
from pydantic_core import PydanticCustomError

from dsserve.core.errors import RequestError
from dsserve.core.request import Limits, SamplingParams, StopConditions
from dsserve.protocol.bounds import (
    BIASED_TOKENS,
    COUNT,
    FIELDS,
    LEAST_REPETITION_PENALTY,
    STOP_CHARACTERS,
    STOP_TOKENS,
    STOPS,
)

_MAX_ECHO = 64
_TOKEN = re.compile(r"-?(0|[1-9][0-9]{0,18})")


def _one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _int_keys(value: Any) -> Any:
    """JSON's keys are strings; each id has one spelling, so that no two keys are the same token."""
    if not isinstance(value, dict):
        return value
    if len(value) > BIASED_TOKENS.most:
        raise PydanticCustomError("bias_count", "at most {most} tokens", {"most": BIASED_TOKENS.most})
    if not all(isinstance(key, str) and _TOKEN.fullmatch(key) for key in value):
        raise PydanticCustomError("bias_keys", 'keys must be token ids, like "17"')
    return {int(key): number for key, number in value.items()}


StopString = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS.most)]
TokenId = Annotated[StrictInt, Field(ge=0)]
Item = TypeVar("Item")
Quick = Annotated[list[Item], Field(fail_fast=True)]  # one complaint is enough: there may be as many as items
Count = Annotated[StrictInt, Field(le=COUNT.most)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Body(BaseModel):
    """Base of all bodies: unknown parameters are errors, types are not converted, and null means "left out"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @checks_model(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > FIELDS.most:
            raise PydanticCustomError("fields", "at most {most} members", {"most": FIELDS.most})
        return {key: item for key, item in value.items() if item is not None} if None in value.values() else value


class SamplingBody(Body):
    """How tokens are chosen and what ends the text. Names and ranges are OpenAI's where it has them, else vLLM's."""

    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 (below 1e-5) = greedy")
    top_p: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="nucleus: likeliest tokens of this mass"
    )
    top_k: StrictInt | None = Field(
        None, ge=-1, description="the k likeliest tokens; 0, -1 and the vocabulary or more = off"
    )
    min_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="least share of the likeliest token's probability"
    )
    typical_p: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="locally typical tokens of this mass"
    )
    repetition_penalty: float = Field(
        1.0,
        ge=LEAST_REPETITION_PENALTY,
        le=10,
        allow_inf_nan=False,
        description="divides logits of tokens in prompt and text",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, allow_inf_nan=False, description="taken off tokens that the text has"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, allow_inf_nan=False, description="taken off for each time the text has it"
    )
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_int_keys)] = Field(
        default={}, max_length=BIASED_TOKENS.most, description="token id -> number added to its logit, -100 to 100"
    )
    seed: StrictInt | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="same request, same seed, same text; default: random"
    )
    stop: Annotated[Quick[StopString], BeforeValidator(_one_is_a_list)] = Field(
        default=[],
        max_length=STOPS.most,
        description="up to handler.max_stops (4) strings; the text ends before the one that is complete first",
    )
    stop_token_ids: Quick[TokenId] = Field(
        default=[], max_length=STOP_TOKENS.most, description="tokens that end the text"
    )
    ignore_eos: bool = Field(False, description="end-of-text tokens do not end the text")
    min_tokens: Count = Field(0, ge=0, description="new tokens before anything but the length may end the text")
    timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="s from the arrival at the handler, at most `handler.request_timeout`; then the request fails",
    )

    def sampling(self, vocabulary: int, logprobs: int | None = None, grammar: str | None = None) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: 400 for a token id that the model does not have.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if any(token >= vocabulary for token in ids):
                raise RequestError(f"{name}: this model's token ids are 0 to {vocabulary - 1}", param=name)
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k if self.top_k is not None and 0 < self.top_k < vocabulary else None,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            grammar=grammar,
        )

    def timeout_s(self, limits: Limits) -> float:
        """Seconds until the request is given up.

        Raises:
            RequestError: 400 for more than the server allows.
        """
        if self.timeout is not None and self.timeout > limits.timeout_s:
            raise RequestError(f"timeout: this server allows at most {limits.timeout_s:g} s", param="timeout")
        return self.timeout or limits.timeout_s

    def stops(self, limits: Limits) -> StopConditions:
        """What ends the text beside its length.

        Raises:
            RequestError: 400 for more strings than the server allows.
        """
        if len(self.stop) > limits.max_stops:
            raise RequestError(f"stop: this server takes at most {limits.max_stops} strings", param="stop")
        return StopConditions(tuple(self.stop), frozenset(self.stop_token_ids), self.ignore_eos)


def explain(error: ValidationError, allowed: list[str], other_names: dict[str, str]) -> RequestError:
    """pydantic's first complaint in the words of the API. Values of the client are not repeated.

    Args:
        allowed: the endpoint's parameters.
        other_names: parameters that people try -> what to do instead.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    location = [str(part)[:_MAX_ECHO] for part in first["loc"]]
    kind, name = first["type"], location[0] if location else None
    if kind == "value_error":
        return RequestError(str(first["ctx"]["error"]), param=name)
    if kind == "extra_forbidden" and len(location) == 1:
        return RequestError(_unknown(str(name), allowed, other_names), param=name)
    # Without pydantic's names of types.
    where = ".".join(part for part in location if part.isdigit() or part.isidentifier()) or "the body"
    if kind == "extra_forbidden":
        return RequestError(f"{where}: unknown", param=name)
    if kind == "string_too_short":
        return RequestError(f"{where} must not be empty", param=name)
    if kind == "too_short":
        return RequestError(f"{where} must not be empty: give at least one", param=name)
    if kind == "missing":
        return RequestError(f"{where} is required", param=name)
    return RequestError(f"{where}: {first['msg']}", param=name)


def _unknown(name: str, allowed: list[str], other_names: dict[str, str]) -> str:
    hint = other_names.get(name)
    return f"{name}: {hint}" if hint else f"{name}: unknown parameter. Allowed: {', '.join(allowed)}"
