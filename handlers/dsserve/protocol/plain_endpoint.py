"""`POST /predictions/<model>`: a prompt or messages, one text back."""

from __future__ import annotations

from typing import Any

from dsserve.core.request import GenerationRequest
from dsserve.protocol.job import Job
from dsserve.protocol.prompt import check_least, encode_messages, encode_text, fit_output
from dsserve.protocol.reply import JsonReply, PlainReply, Reply, SseReply
from dsserve.protocol.reply_size import Texts, check_reply
from dsserve.protocol.schema import GenerateBody, parse_body
from dsserve.protocol.served import ServedModel


def generate(request_id: str, body: str | dict[str, Any], served: ServedModel) -> Job:
    """The job of a plain prompt or a JSON body.

    Raises:
        RequestError: 413 for a prompt that is too long, else 400.
    """
    parsed = parse_body(body)
    reply: Reply = PlainReply()
    if isinstance(parsed, GenerateBody):
        reply = SseReply() if parsed.stream else JsonReply()
    else:
        parsed = GenerateBody(prompt=parsed)
    if parsed.messages is None:
        ids = encode_text(parsed.prompt or "", served)
    else:
        messages = [message.model_dump() for message in parsed.messages]
        ids = encode_messages(messages, served)
    limit = fit_output(parsed.max_new_tokens, len(ids), served.limits)
    check_least(parsed.min_tokens, limit)
    if not parsed.stream:
        check_reply([Texts(1, limit, served.token_sizes.text)], "max_new_tokens")
    stops = parsed.stops(served.limits)
    request = GenerationRequest(request_id, tuple(ids), limit, parsed.sampling(served.vocabulary), stops)
    return Job(reply, (request,), parsed.timeout_s(served.limits))
