"""What a client asks for and what it got, as the engine sees it: token ids and numbers, no text of HTTP.

Does not parse bodies (`protocol`) and does not choose tokens (`sampler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, in tokens.

    `max_model_len` bounds prompt + output; the two others are the default and the ceiling of `max_new_tokens`.
    """

    max_model_len: int
    max_new_tokens_default: int
    max_new_tokens_limit: int


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` and `top_p` are off at None."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate. `prompt_ids` holds at least one token and leaves room for `max_new_tokens`."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request: read and written."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        """The `usage` object of a reply."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
