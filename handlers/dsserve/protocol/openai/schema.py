"""The JSON bodies under `v1/`: OpenAI's completions and chat, and the tokenizer endpoints of other servers.

Types, ranges and combinations that need no model. Parameters of OpenAI's that this server does not have are refused by
name with what to do instead (`_REFUSED`), never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, StrictInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dsserve.protocol.bounds import (
    CALLS,
    DESCRIPTION_CHARACTERS,
    FUNCTION_NAME,
    ID_CHARACTERS,
    LOGPROBS,
    MESSAGES,
    NAME_CHARACTERS,
    PARTS,
    SALT_CHARACTERS,
    TOOLS,
    USER_CHARACTERS,
    N,
)
from dsserve.protocol.fields import Body, Count, Quick, SamplingBody, TokenId, explain

_REFUSED = {
    "best_of": "not supported; ask for n and choose yourself",
    "suffix": "not supported: this model does not fill in the middle",
    "functions": "replaced by tools",
    "function_call": "replaced by tool_choice",
    "max_new_tokens": "did you mean max_tokens?",
    "top_logprobs": "completions take logprobs as a number; top_logprobs is chat's",
    "max_completion_tokens": "completions call it max_tokens; max_completion_tokens is chat's",
    "echo": "only completions have echo",
    "prompt": "chat takes messages",
    "messages": "completions take a prompt; POST to v1/chat/completions",
    "audio": "not supported: text only",
    "modalities": "not supported: text only",
    "prediction": "not supported",
    "reasoning_effort": "not supported",
    "service_tier": "not supported",
    "store": "not supported: nothing is stored",
    "use_beam_search": "not supported",
    "length_penalty": "not supported: there is no beam search",
    "guided_json": "replaced by response_format",
}
_SHAPES = "a string, a list of strings, a list of token ids, or a list of such lists"


def _are_ids(value: list[Any]) -> bool:
    return set(map(type, value)) == {int} and min(value) >= 0


def _check_prompt(value: Any) -> Any:
    """One complaint instead of pydantic's four, one for each shape."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompt_shape", "must be {shapes}, not empty", {"shapes": _SHAPES})

    kinds = set(map(type, value))
    if kinds != {str} and not _are_ids(value) and not (kinds == {list} and all(map(_are_ids, value))):
        raise PydanticCustomError("prompt_shape", "must be {shapes}, not mixed, none empty", {"shapes": _SHAPES})
    return value


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _check_content(value: Any) -> Any:
    """Names the kind of part that a text model cannot read."""
    for part in value if isinstance(value, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "content_part", "a text model reads a string or parts of type text, no other parts"
            )
    return value


Content = Annotated[str | Quick[TextPart], BeforeValidator(_check_content)]
Name = Annotated[str, Field(max_length=NAME_CHARACTERS.most)]
CallId = Annotated[str, Field(max_length=ID_CHARACTERS.most)]
Description = Annotated[str, Field(max_length=DESCRIPTION_CHARACTERS.most)]
FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]


class FunctionCall(Body):
    """A call that the model made in an earlier turn; `arguments` is JSON text."""

    name: Name
    arguments: str


class ToolCall(Body):
    """One of an assistant message's calls."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One turn of a conversation. `tool` messages answer the call named by `tool_call_id`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Quick[ToolCall] = Field(default=[])
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content (a string, or a list of parts of type text)")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only assistant messages have tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool messages, and they alone, have a tool_call_id")
        return self


def _check_turns(value: Any) -> Any:
    """Bounds what all messages hold together, before any of it is read."""
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    for name, bound in (("content", PARTS), ("tool_calls", CALLS)):
        if sum(len(turn[name]) for turn in turns if isinstance(turn.get(name), list)) > bound.most:
            raise PydanticCustomError("turns", "at most {most} {what}", {"most": bound.most, "what": bound.what})
    return value


Messages = Annotated[Quick[ChatMessage], Field(min_length=1, max_length=MESSAGES.most), BeforeValidator(_check_turns)]


class FunctionTool(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: Description | None = None
    parameters: dict[str, Any] = Field(default={})
    strict: bool | None = None


class Tool(Body):
    """One entry of `tools`."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """The function of a tool choice."""

    name: Name


class NamedTool(Body):
    """A tool choice that demands one function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """`response_format.json_schema`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    name: FunctionName
    description: Description | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the text must be: anything, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_named(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format of type json_schema, and it alone, holds json_schema")
        return self


class StreamOptions(Body):
    """`include_usage`: a last chunk with the usage; `continuous_usage_stats`: usage so far in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class V1Body(SamplingBody):
    """What completions and chat share."""

    model: Name | None = Field(None, description="the model's name, as in the path; another one is 404")
    n: StrictInt = Field(
        1,
        ge=1,
        le=N.most,
        description="texts for each prompt, at most `handler.max_n`; all prompts together: max_running + max_waiting",
    )
    stream: bool = Field(False, description="server-sent events instead of one reply")
    stream_options: StreamOptions | None = Field(
        None, description="`include_usage`: usage in a last event; `continuous_usage_stats`: usage in each event"
    )
    response_format: ResponseFormat | None = Field(
        None, description="`text`, `json_object` or `json_schema`: the text matches, and ends where the JSON ends"
    )
    user: str | None = Field(
        None, max_length=USER_CHARACTERS.most, description="the caller's own mark; neither used nor logged"
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=SALT_CHARACTERS.most,
        description="only requests with the same salt find each other's prompts in the KV cache",
    )
    priority: StrictInt = Field(
        0, ge=-(2**31), le=2**31 - 1, description="of requests that wait, those with a lower number run first"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> V1Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        wants_json = self.response_format is not None and self.response_format.type != "text"
        if wants_json and (self.min_tokens or self.ignore_eos):
            raise ValueError("response_format decides where the text ends: leave out min_tokens and ignore_eos")
        return self


class CompletionBody(V1Body):
    """`POST v1/completions`."""

    prompt: Annotated[str | Quick[str] | Quick[TokenId] | Quick[Quick[TokenId]], BeforeValidator(_check_prompt)] = (
        Field(description="text, texts, token ids, or lists of token ids")
    )
    max_tokens: Count = Field(16, ge=0, description="new tokens; 0 only with `echo`")
    logprobs: StrictInt | None = Field(
        None,
        ge=0,
        le=LOGPROBS.most,
        description="likeliest tokens to report beside the chosen one; log probabilities are those of the model's own "
        "logits, before temperature and penalties",
    )
    echo: bool = Field(
        False, description="the prompt before the text; not streamed; with `logprobs` prompts up to 2048 tokens"
    )

    @model_validator(mode="after")
    def _some_output(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 (0 is for echo: true)")
        if self.echo and self.stream:
            raise ValueError("echo cannot be streamed: leave out stream")
        return self


class ChatBody(V1Body):
    """`POST v1/chat/completions`."""

    messages: Messages = Field(
        description="turns with `role` and `content` (text, or parts of type `text`), for the chat template",
    )
    max_tokens: Count | None = Field(None, ge=1, description="older name of `max_completion_tokens`")
    max_completion_tokens: Count | None = Field(
        None, ge=1, description="new tokens; default: `handler.max_new_tokens`, cut to the room in the context"
    )
    logprobs: bool = Field(False, description="report each token's log probability")
    top_logprobs: StrictInt | None = Field(None, ge=0, le=LOGPROBS.most, description="likeliest tokens to report")
    tools: Quick[Tool] = Field(
        default=[],
        max_length=TOOLS.most,
        description="functions, for templates that write `<tool_call>` (Hermes, Qwen)",
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="default: `auto` with tools; a demanded call is held to its schema"
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call")

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.tool_names:
            raise ValueError("tool_choice names a function that is not among the tools")
        return self

    @property
    def tool_names(self) -> list[str]:
        """The functions that the model may call."""
        return [tool.function.name for tool in self.tools]

    @property
    def output_limit(self) -> int | None:
        """New tokens asked for, by either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], body: Any) -> AnyBody:
    """Checks a JSON body.

    Raises:
        RequestError: 400; names the parameter and what is allowed.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise explain(error, list(kind.model_fields), _REFUSED) from None
