"""Prompts to token ids, and how many new tokens fit. Knows the tokenizer and the limits, not the engine.

Rank 0 reads requests while every stream waits, so what is refused anyway is refused before it costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from dsserve.errors import RequestError
from dsserve.generation.request import Limits

# A text of fewer characters a token of the context is tokenized whole at once.
_CHARACTERS_A_TOKEN = 8


def encode_text(text: str, tokenizer: Any, limits: Limits) -> list[int]:
    """Token ids of a prompt.

    Raises:
        RequestError: 400 where it gives no tokens, 413 where it is far above the context.
    """
    return _some(_encode(text, tokenizer, limits), "prompt")


def encode_messages(messages: list[dict[str, Any]], tokenizer: Any, limits: Limits, **options: Any) -> list[int]:
    """Token ids of a conversation in the model's chat template, which brings its own BOS.

    Args:
        options: what the template knows beside messages: `tools`, `add_generation_prompt` (true where left out).

    Raises:
        RequestError: 400 without a template, or where it refuses the messages; 413 far above the context.
    """
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template: send `prompt` instead of `messages`", param="messages")
    options = {"add_generation_prompt": True, **options}
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        # A template's own complaint is for the client; anything else is Python's about a value that it did not expect.
        reason = str(error)[:200] if isinstance(error, TemplateError) else type(error).__name__
        raise RequestError(f"the model's chat template refuses these messages: {reason}", param="messages") from None
    return _some(_encode(text, tokenizer, limits, add_special_tokens=False), "messages")


def _encode(text: str, tokenizer: Any, limits: Limits, **options: Any) -> list[int]:
    """Token ids; of a text that is far too long only the beginning is tokenized, which takes 1 s for a megabyte."""
    most, size = limits.max_model_len, _CHARACTERS_A_TOKEN * limits.max_model_len
    while size < len(text):
        if len(tokenizer(text[:size], **options)["input_ids"]) > 2 * most:
            raise _too_long(f"more than {2 * most}", limits)
        size *= 4
    return list(tokenizer(text, **options)["input_ids"])


def check_texts(count: int, limits: Limits, a_prompt: int = 1) -> None:
    """Checks how many texts a request asks for; cheap, and to be asked before any of them is made.

    Args:
        count: prompts x n.
        a_prompt: n.

    Raises:
        RequestError: 400.
    """
    if a_prompt > limits.max_n:
        raise RequestError(f"n {a_prompt} is above this server's ceiling: at most {limits.max_n}", param="n")
    most = limits.max_running + limits.max_waiting
    if count > most:
        raise RequestError(
            f"the request asks for {count} texts (prompts x n); this server takes at most {most} at a time", param="n"
        )


def check_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """Token ids that a client sent.

    Raises:
        RequestError: 400 for ids that the model does not have.
    """
    if any(token >= vocabulary for token in ids):
        raise RequestError(f"prompt: this model's token ids are 0 to {vocabulary - 1}", param="prompt")
    return list(ids)


def _some(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise RequestError(f"{param} gives no tokens: send some text", param=param)
    return ids


def fit_output(asked: int | None, prompt: int, limits: Limits, param: str = "max_new_tokens") -> int:
    """The most new tokens for a prompt of `prompt` tokens. What is asked for must fit the context whole; the default is
    cut to what fits.

    Args:
        param: what the endpoint calls it.

    Raises:
        RequestError: 413 for what is too long for the context, 400 for what is above the ceiling.
    """
    least = 1 if asked is None else min(asked, 1)
    room = limits.max_model_len - prompt
    if room < least:
        raise _too_long(str(prompt), limits)
    if asked is None:
        return min(limits.max_new_tokens_default, room)
    if asked > limits.max_new_tokens_limit:
        raise RequestError(
            f"{param} {asked} is above this server's ceiling: at most {limits.max_new_tokens_limit}", param=param
        )
    if asked > room:
        raise RequestError(
            f"prompt ({prompt} tokens) + {param} ({asked}) is above the context of {limits.max_model_len}: "
            f"shorten the prompt, or ask for at most {room}",
            status=413,
            param=param,
        )
    return asked


def _too_long(count: str, limits: Limits) -> RequestError:
    return RequestError(
        f"the prompt has {count} tokens; with at least one new token the context holds {limits.max_model_len}: "
        f"shorten the prompt to {limits.max_model_len - 1} tokens",
        status=413,
        param="prompt",
    )


def check_least(min_tokens: int, most: int) -> None:
    """Raises RequestError (400) where more new tokens are demanded than there may be."""
    if min_tokens > most:
        raise RequestError(f"min_tokens {min_tokens} is above the {most} new tokens at most", param="min_tokens")
