"""The endpoints under `v1/`: a checked body to a job or to a finished answer.

Bodies are `schema`'s, replies `reply`'s. Errors that OpenAI's clients know by another status or code than
the plain endpoint's are translated in `routes`.
"""

from __future__ import annotations

import json
from typing import Any

from dsserve.core.errors import RequestError
from dsserve.core.request import GenerationRequest, SamplingParams, StopConditions
from dsserve.protocol.bounds import ECHOED_LOGPROBS
from dsserve.protocol.job import Job
from dsserve.protocol.json_bounds import check_json
from dsserve.protocol.openai.reply import Envelope, StreamReply, WholeReply
from dsserve.protocol.openai.schema import ChatBody, ChatMessage, CompletionBody, FunctionCall, NamedTool, V1Body, parse
from dsserve.protocol.openai.shapes import ChatShape, CompletionShape, Shape
from dsserve.protocol.openai.structured import call_grammar, check_tools, response_grammar
from dsserve.protocol.openai.tools import CLOSING, OPENING, ToolCallText, check_tool_format
from dsserve.protocol.prompt import (
    check_ids,
    check_least,
    check_prompt_tokens,
    check_texts,
    decode,
    encode_messages,
    encode_text,
    fit_output,
)
from dsserve.protocol.reply import Reply, to_json
from dsserve.protocol.reply_size import CALL_FACTOR, Texts, check_reply, echo_size
from dsserve.protocol.served import ServedModel


def list_models(served: ServedModel) -> bytes:
    """`GET v1/models`."""
    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "dsserve",
        "root": served.name,
        "max_model_len": served.limits.max_model_len,
        "engine": {**served.engine, **({"fallback": served.fallback} if served.fallback else {})},
    }
    return to_json({"object": "list", "data": [model]})


def complete(request_id: str, body: Any, served: ServedModel) -> Job:
    """`POST v1/completions`."""
    parsed = parse(CompletionBody, body)
    check_model(parsed.model, served)
    prompts = _prompts(parsed, served)  # checks how many
    wants_prompt_logprobs = parsed.echo and parsed.logprobs is not None
    longest = max(map(len, prompts))
    if wants_prompt_logprobs and longest > ECHOED_LOGPROBS.most:
        raise RequestError(
            f"echo with logprobs reads prompts of up to {ECHOED_LOGPROBS.most} tokens, this one has {longest}",
            param="echo",
        )
    grammar = response_grammar(parsed.response_format, served.grammars)
    sampling = parsed.sampling(served.vocabulary, parsed.logprobs, grammar)
    requests, shapes, texts = list[GenerationRequest](), list[Shape](), list[Texts]()
    token_text = None if parsed.logprobs is None else served.token_text
    reported = 0 if parsed.logprobs is None else served.token_sizes.completion[parsed.logprobs]
    for ids in prompts:
        limit = fit_output(parsed.max_tokens, len(ids), served.limits, "max_tokens")
        requests += _sequences(request_id, ids, limit, parsed, sampling, len(requests), served, wants_prompt_logprobs)
        echoed = decode(ids, served) if parsed.echo else ""
        before = echo_size(echoed) + reported * len(ids) * wants_prompt_logprobs
        texts.append(Texts(parsed.n, limit, served.token_sizes.text + reported, before))
        shapes += [CompletionShape(token_text, echoed) for _ in range(parsed.n)]
    if not parsed.stream:
        check_reply(texts, "max_tokens")
    return Job(_reply(parsed, Envelope.of(served, "cmpl"), shapes), tuple(requests), parsed.timeout_s(served.limits))


def _prompts(body: CompletionBody, served: ServedModel) -> list[list[int]]:
    prompt: Any = body.prompt
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    check_texts(len(several) * body.n, served.limits, body.n)
    found: list[list[int]] = []
    count = 0
    for one in several:
        found.append(encode_text(one, served) if isinstance(one, str) else check_ids(one, served.vocabulary))
        count += len(found[-1])
        check_prompt_tokens(count, served.limits)
    return found


def chat(request_id: str, body: Any, served: ServedModel) -> Job:
    """`POST v1/chat/completions`."""
    parsed = parse(ChatBody, body)
    check_model(parsed.model, served)
    check_texts(parsed.n, served.limits, parsed.n)
    check_tools(parsed.tools)
    grammar = response_grammar(parsed.response_format, served.grammars)
    uses_tools = bool(parsed.tools) and parsed.tool_choice != "none"
    options: dict[str, Any] = {}
    if uses_tools:
        check_tool_format(_template(served))
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in parsed.tools]
        grammar = _demanded_call(parsed, served, grammar)
    messages = render_messages(parsed.messages)
    ids = encode_messages(messages, served, **options)
    name = "max_tokens" if parsed.max_completion_tokens is None else "max_completion_tokens"
    limit = fit_output(parsed.output_limit, len(ids), served.limits, name)
    logprobs = (parsed.top_logprobs or 0) if parsed.logprobs else None
    sampling = parsed.sampling(served.vocabulary, logprobs, grammar)
    if not parsed.stream:
        sizes = served.token_sizes
        a_token = sizes.text * (CALL_FACTOR if uses_tools else 1) + (0 if logprobs is None else sizes.chat[logprobs])
        check_reply([Texts(parsed.n, limit, a_token)], name)
    most_calls = None if parsed.parallel_tool_calls else 1
    shapes: list[Shape] = [
        ChatShape(served.token_text if parsed.logprobs else None, ToolCallText() if uses_tools else None, most_calls)
        for _ in range(parsed.n)
    ]
    requests = _sequences(request_id, ids, limit, parsed, sampling, 0, served)
    return Job(
        _reply(parsed, Envelope.of(served, "chatcmpl"), shapes), tuple(requests), parsed.timeout_s(served.limits)
    )


def _demanded_call(body: ChatBody, served: ServedModel, grammar: str | None) -> str | None:
    """The grammar of a call where `tool_choice` demands one."""
    choice = body.tool_choice
    if choice in (None, "auto"):
        return grammar
    if grammar is not None or body.min_tokens or body.ignore_eos:
        raise RequestError(
            "tool_choice that demands a call decides the text: leave out response_format, min_tokens and ignore_eos",
            param="tool_choice",
        )
    names = [choice.function.name] if isinstance(choice, NamedTool) else body.tool_names
    return call_grammar(body.tools, names, served.grammars, f"{OPENING}\n", f"\n{CLOSING}")


def _template(served: ServedModel) -> str | None:
    template = served.tokenizer.chat_template
    return str(template) if template else None


def check_model(name: str | None, served: ServedModel) -> None:
    """Raises RequestError (404, `model_not_found`) for another model than the one in the path."""
    if name is not None and name != served.name:
        raise RequestError(
            f"this path serves the model {served.name!r}, not the one asked for: use its name, or another path",
            status=404,
            param="model",
            code="model_not_found",
        )


def render_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: text parts joined, arguments of calls as objects.

    Raises:
        RequestError: 400 for arguments that are no JSON.
    """
    return [_render(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _render(message: ChatMessage, where: str) -> dict[str, Any]:
    content = message.content
    rendered: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    rendered["content"] = "\n".join(part.text for part in content) if isinstance(content, list) else content or ""
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": _function(call.function, f"{where}.tool_calls[{at}].function"),
            }
            for at, call in enumerate(message.tool_calls)
        ]
    return rendered


def _function(call: FunctionCall, where: str) -> dict[str, Any]:
    where += ".arguments"
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        raise RequestError(f"{where} must be JSON text", param=where) from None
    check_json(value, where)
    return {"name": call.name, "arguments": value}


def _sequences(
    request_id: str,
    ids: list[int],
    limit: int,
    body: V1Body,
    sampling: SamplingParams,
    first: int,
    served: ServedModel,
    prompt_logprobs: bool = False,
) -> list[GenerationRequest]:
    """`body.n` sequences of one prompt, numbered from `first`."""
    stops: StopConditions = body.stops(served.limits)
    check_least(body.min_tokens, limit)
    return [
        GenerationRequest(
            request_id,
            tuple(ids),
            limit,
            sampling,
            stops,
            first + index,
            prompt_logprobs,
            body.priority,
            body.cache_salt,
        )
        for index in range(body.n)
    ]


def _reply(body: V1Body, envelope: Envelope, shapes: list[Shape]) -> Reply:
    if body.stream:
        return StreamReply(envelope, shapes, body.n, body.stream_options)
    return WholeReply(envelope, shapes, body.n)
