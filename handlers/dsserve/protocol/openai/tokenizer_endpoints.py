"""`v1/tokenize` and `v1/detokenize`, as other servers have them: text or messages to token ids, and back."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from dsserve.core.errors import RequestError
from dsserve.protocol.fields import Body, Quick, TokenId
from dsserve.protocol.openai.endpoints import check_model, render_messages
from dsserve.protocol.openai.schema import Messages, Name, parse
from dsserve.protocol.prompt import check_ids, decode, encode, encode_messages
from dsserve.protocol.reply import to_json
from dsserve.protocol.reply_size import Texts, check_reply
from dsserve.protocol.served import ServedModel


class TokenizeBody(Body):
    """`POST v1/tokenize`: `prompt` or `messages`."""

    model: Name | None = Field(None, description="the model's name, as in the path")
    prompt: str | None = Field(None, description="text; give this or `messages`")
    messages: Messages | None = Field(None, description="turns, as for chat")
    add_special_tokens: bool = Field(True, description="tokens that the tokenizer puts around a prompt")
    add_generation_prompt: bool = Field(True, description="the template's beginning of an answer, after the messages")

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """`POST v1/detokenize`."""

    model: Name | None = Field(None, description="the model's name, as in the path")
    tokens: Quick[TokenId] = Field(description="token ids")


def tokenize(request_id: str, body: Any, served: ServedModel) -> bytes:
    """`POST v1/tokenize`."""
    parsed = parse(TokenizeBody, body)
    check_model(parsed.model, served)
    if parsed.messages is not None:
        messages = render_messages(parsed.messages)
        options = {"add_generation_prompt": parsed.add_generation_prompt}
        ids = encode_messages(messages, served, **options)
    else:
        ids = encode(parsed.prompt or "", served, "prompt", add_special_tokens=parsed.add_special_tokens)
    return to_json({"count": len(ids), "max_model_len": served.limits.max_model_len, "tokens": ids})


def detokenize(request_id: str, body: Any, served: ServedModel) -> bytes:
    """`POST v1/detokenize`."""
    parsed = parse(DetokenizeBody, body)
    check_model(parsed.model, served)
    if len(parsed.tokens) > served.limits.max_model_len:
        raise RequestError(
            f"tokens: {len(parsed.tokens)} token ids are more than the context of {served.limits.max_model_len}: send "
            "them in parts",
            param="tokens",
        )
    check_reply([Texts(1, len(parsed.tokens), served.token_sizes.text)], "tokens")
    return to_json({"prompt": decode(check_ids(parsed.tokens, served.vocabulary, "tokens"), served)})
