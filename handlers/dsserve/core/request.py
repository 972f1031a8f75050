"""What a client asks for and what it got, as the engine sees it: token ids and numbers, no text of HTTP.

Does not parse bodies (`protocol`) and does not choose tokens (`sampler`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsserve.core.errors import RequestError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    `max_model_len` bounds prompt + output; the two after it are the default and the ceiling of `max_new_tokens`, all in
    tokens. `max_running` and `max_waiting` count sequences: those that generate, and those that wait for a row.
    `timeout_s` bounds the seconds from a request's arrival at the handler to its end, and is their default. `max_n`
    bounds the texts for one prompt, `max_stops` the stop strings.
    """

    max_model_len: int
    max_new_tokens_default: int
    max_new_tokens_limit: int
    max_running: int = 16
    max_waiting: int = 64
    timeout_s: float = 600.0
    max_n: int = 128
    max_stops: int = 4


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Every default leaves the logits as they are; `temperature` 0 is greedy.

    Attributes:
        min_tokens: no end-of-text token before so many new tokens.
        logprobs: how many of the likeliest tokens to report beside each chosen one; None reports nothing.
        grammar: what the text must match, as llguidance's serialized grammar.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class StopConditions:
    """What ends a text beside its length. `strings` and what follows them are cut; tokens give no text."""

    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate; a client's request may hold several, told apart by `index`.

    `prompt_ids` holds at least one token and leaves room for `max_new_tokens`, which may be 0 with `prompt_logprobs`.
    Those of less `priority` come first. Texts with different `cache_salt` share no keys and values.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: StopConditions = StopConditions()
    index: int = 0
    prompt_logprobs: bool = False
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True)
class Origin:
    """When a client's request came, and what it is known by.

    Attributes:
        arrived: seconds of the monotonic clock.
        client_id: the client's own id of the request, checked, where it sent one.
        traceparent: the client's span (W3C trace context), as it came.
    """

    arrived: float = field(default_factory=time.monotonic)
    client_id: str | None = None
    traceparent: str | None = None

    def name(self, request_id: str) -> str:
        """How log lines call the request: TorchServe's id, the client's own beside it."""
        return f"{request_id} ({self.client_id})" if self.client_id else request_id


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability under the model's own logits, and the likeliest tokens there, best first.

    The first token of a prompt has no probability: None."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What one step gave one sequence: new text, and at the end the reason and the counts.

    Attributes:
        text: may be empty: a character or a stop string may not be complete.
        logprobs: of the tokens that came since the last event, where asked for.
        prompt_logprobs: of the whole prompt, in the first event, where asked for.
        completion_tokens: new tokens so far, an end-of-text token included.
        cached_tokens: tokens of the prompt that were not computed again.
        failed: the sequence could not go on, for a fault of ours.
        error: what the client is told then, if that is more than "internal error".
    """

    request_id: str
    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failed: bool = False
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        return self.failed or self.finish_reason is not None


@dataclass
class Usage:
    """Tokens of one client's request: prompts counted once however many texts they get, and all new tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """The `usage` object of a reply."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
