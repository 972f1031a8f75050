"""A checked body to a generation request: chat template, tokens, limits. Knows the tokenizer, not the engine."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from dsserve.errors import RequestError
from dsserve.generation.request import GenerationRequest, Limits, SamplingParams
from dsserve.protocol.schema import GenerateBody


def build_request(request_id: str, body: GenerateBody | str, tokenizer: Any, limits: Limits) -> GenerationRequest:
    """What the engine gets.

    A `max_new_tokens` that was asked for must fit the context whole; the default is cut to what fits.

    Raises:
        RequestError: 413 for a prompt that is too long, else 400.
    """
    if isinstance(body, str):
        body = GenerateBody(prompt=body)
    prompt_ids = encode_prompt(body, tokenizer)
    max_new_tokens = _fit(body.max_new_tokens, len(prompt_ids), limits)
    sampling = SamplingParams(body.temperature, body.top_k, body.top_p, body.seed)
    return GenerationRequest(request_id, tuple(prompt_ids), max_new_tokens, sampling, tuple(body.stop))


def encode_prompt(body: GenerateBody, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, or of the messages in the model's chat template, which brings its own BOS.

    Raises:
        RequestError: 400.
    """
    if body.messages is None:
        name, ids = "prompt", tokenizer(body.prompt)["input_ids"]
    else:
        name, ids = "messages", tokenizer(_render(body, tokenizer), add_special_tokens=False)["input_ids"]
    if not ids:
        raise RequestError(f"{name} gives no tokens: send some text", param=name)
    return list(ids)


def _render(body: GenerateBody, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template: send `prompt` instead of `messages`", param="messages")
    messages = [message.model_dump() for message in body.messages or []]
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        reason = str(error)[:200]
        raise RequestError(f"the model's chat template refuses these messages: {reason}", param="messages") from None


def _fit(asked: int | None, prompt: int, limits: Limits) -> int:
    room = limits.max_model_len - prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {prompt} tokens; with at least one new token the context holds {limits.max_model_len}: "
            f"shorten the prompt to {limits.max_model_len - 1} tokens",
            status=413,
            param="prompt",
        )
    if asked is None:
        return min(limits.max_new_tokens_default, room)
    if asked > limits.max_new_tokens_limit:
        raise RequestError(
            f"max_new_tokens {asked} is above this server's ceiling: at most {limits.max_new_tokens_limit}",
            param="max_new_tokens",
        )
    if asked > room:
        raise RequestError(
            f"prompt ({prompt} tokens) + max_new_tokens ({asked}) is above the context of {limits.max_model_len}: "
            f"shorten the prompt, or ask for at most {room}",
            status=413,
            param="max_new_tokens",
        )
    return asked
