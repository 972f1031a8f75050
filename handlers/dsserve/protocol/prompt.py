"""Prompts to token ids, and how many new tokens fit. Knows the served model, not the engine.

Rank 0 reads requests while every stream waits, so what is refused anyway is refused before it costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from dsserve.core.errors import RequestError
from dsserve.core.request import Limits
from dsserve.protocol.bounds import CHARACTERS_A_TOKEN, PROMPT_CHARACTERS, PROMPT_TOKENS
from dsserve.protocol.served import ServedModel

# A text of fewer characters a token of the context is tokenized whole at once, a longer one is counted before.
_DENSE = 4
_MOST_SLICE = 16_384


def encode_text(text: str, served: ServedModel) -> list[int]:
    """Token ids of a prompt.

    Raises:
        RequestError: 400 where it gives no tokens, or one that the model does not have; 413 far above the context.
    """
    return _some(encode(text, served, "prompt"), "prompt")


def encode_messages(messages: list[dict[str, Any]], served: ServedModel, **options: Any) -> list[int]:
    """Token ids of a conversation in the model's chat template, which brings its own BOS.

    Args:
        options: what the template knows beside messages: `tools`, `add_generation_prompt` (true where left out).

    Raises:
        RequestError: 400 without a template, or where it refuses the messages; else as `encode_text`.
    """
    if not served.tokenizer.chat_template:
        raise RequestError("this model has no chat template: send `prompt` instead of `messages`", param="messages")
    options = {"add_generation_prompt": True, **options}
    try:
        text = str(served.tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program, and what it meets in these messages is its own affair
        # Its own complaint is for the client; anything else is Python's about a value that it did not expect.
        reason = str(error)[:200] if isinstance(error, TemplateError) else type(error).__name__
        raise RequestError(f"the model's chat template refuses these messages: {reason}", param="messages") from None
    return _some(encode(text, served, "messages", add_special_tokens=False), "messages")


def encode(text: str, served: ServedModel, param: str, **options: Any) -> list[int]:
    """Token ids of any text, also of none.

    Args:
        param: the member that it came from.
        options: the tokenizer's.

    Raises:
        RequestError: 413 where it is far above the context, which is found out at the price of two contexts at most;
            400 for a token that the model does not have.
    """
    most = served.limits.max_model_len
    if len(text) > max(PROMPT_CHARACTERS.most, CHARACTERS_A_TOKEN * most):
        raise _too_long(f"{len(text)} characters", param, served.limits)
    far_above = 2 * most
    if len(text) > _DENSE * most and _holds_more(text, far_above, served):
        raise _too_long(f"more than {far_above} tokens", param, served.limits)
    ids = list(served.tokenizer(text, **options)["input_ids"])
    if len(ids) > far_above:
        raise _too_long(f"{len(ids)} tokens", param, served.limits)
    if ids and max(ids) >= served.vocabulary:
        raise _unknown_token(max(ids), param, served)
    return ids


def _holds_more(text: str, most: int, served: ServedModel) -> bool:
    """Whether a text has more than `most` tokens, slice by slice; a cut adds hardly any."""
    start, size, found = 0, min(_DENSE * served.limits.max_model_len, _MOST_SLICE), 0
    while start < len(text) and found <= most:
        found += len(served.tokenizer(text[start : start + size], add_special_tokens=False)["input_ids"])
        start, size = start + size, min(2 * size, _MOST_SLICE)
    return found > most


def _unknown_token(token: int, param: str, served: ServedModel) -> RequestError:
    piece = served.tokenizer.convert_ids_to_tokens(token)
    return RequestError(
        f"{param}: the tokenizer reads {piece!r:.80} as token {token}, and this model's ids are 0 to "
        f"{served.vocabulary - 1}: leave it out",
        param=param,
    )


def check_prompt_tokens(count: int, limits: Limits) -> None:
    """Checks the tokens of all prompts of a request together.

    Raises:
        RequestError: 400.
    """
    most = max(PROMPT_TOKENS.most, limits.max_model_len)
    if count > most:
        raise RequestError(
            f"prompt: the prompts have {count} tokens or more together, and one request may have {most}: send fewer "
            "prompts at a time",
            param="prompt",
        )


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


def check_ids(ids: Sequence[int], vocabulary: int, param: str = "prompt") -> list[int]:
    """Token ids that a client sent.

    Raises:
        RequestError: 400 for ids that the model does not have.
    """
    if ids and max(ids) >= vocabulary:
        raise RequestError(f"{param}: this model's token ids are 0 to {vocabulary - 1}", param=param)
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
        raise _too_long(f"{prompt} tokens", "prompt", limits)
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


def _too_long(size: str, param: str, limits: Limits) -> RequestError:
    return RequestError(
        f"the prompt has {size}; with at least one new token the context holds {limits.max_model_len} tokens: "
        f"shorten the prompt to {limits.max_model_len - 1} tokens",
        status=413,
        param=param,
    )


def check_least(min_tokens: int, most: int) -> None:
    """Raises RequestError (400) where more new tokens are demanded than there may be."""
    if min_tokens > most:
        raise RequestError(f"min_tokens {min_tokens} is above the {most} new tokens at most", param="min_tokens")


def decode(ids: list[int], served: ServedModel) -> str:
    """The text of token ids, special tokens too."""
    return str(served.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
