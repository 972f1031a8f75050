"""OpenAI's own Python client against a real TorchServe with two ranks: every endpoint, only its base URL set."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from dsserve.runner.autotp import PAGE_TOKENS
from tests.e2e.conftest import Served

BAD_SCHEMA = {"name": "a", "schema": {"type": "no"}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(fp32: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fp32.base_url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def chat(client: openai.OpenAI, **parameters: Any) -> Any:
    defaults: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    return client.chat.completions.create(**{**defaults, **parameters})


def complete(client: openai.OpenAI, **parameters: Any) -> Any:
    defaults: dict[str, Any] = {"model": "smollm2", "prompt": "One, two, three,", "temperature": 0, "max_tokens": 8}
    return client.completions.create(**{**defaults, **parameters})


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "smollm2" and model.object == "model" and model.created > 1.7e9
    assert model.model_extra is not None and model.model_extra["max_model_len"] == 8192
    assert model.model_extra["engine"]["tensor_parallel_size"] == 2


def test_chat(client: openai.OpenAI) -> None:
    reply = chat(client)
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and "Paris" in choice.message.content
    assert choice.finish_reason == "stop" and reply.object == "chat.completion" and reply.model == "smollm2"
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint.startswith("fp_")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_chat_stream_has_the_text_of_the_whole(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_asynchronous_client_streams_several_at_once(fp32: Served) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="smollm2", prompt=f"{number} plus one is", temperature=0, max_tokens=6, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=fp32.base_url, api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, number) for number in range(6)))
            return together, [await one(client, number) for number in range(6)]

    together, alone = asyncio.run(all_of_them())
    assert together == alone


def test_completions_take_all_shapes_of_prompts(client: openai.OpenAI, fp32: Served) -> None:
    prompts = ["One, two, three,", "The sky is"]
    texts = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    ids = [tokenize(fp32, prompt) for prompt in prompts]
    assert [choice.text for choice in complete(client, prompt=prompts).choices] == texts
    assert [choice.text for choice in complete(client, prompt=ids).choices] == texts
    assert complete(client, prompt=ids[0]).choices[0].text == texts[0]
    echoed = complete(client, prompt=prompts[0], echo=True).choices[0].text
    assert echoed == prompts[0] + texts[0]


def tokenize(served: Served, prompt: str) -> list[int]:
    body = httpx.post(f"{served.base_url}/tokenize", json={"prompt": prompt}).json()
    assert body["count"] == len(body["tokens"]) and body["max_model_len"] == 8192
    assert httpx.post(f"{served.base_url}/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": prompt}
    return body["tokens"]


def test_messages_are_tokenized_as_chat_reads_them(client: openai.OpenAI, fp32: Served) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    count = httpx.post(f"{fp32.base_url}/tokenize", json={"messages": parts}).json()["count"]
    assert count == chat(client, messages=parts).usage.prompt_tokens


def test_n_texts_of_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    def texts() -> list[str]:
        reply = complete(client, n=4, temperature=1.0, seed=5, max_tokens=12)
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        assert reply.usage.completion_tokens <= 48
        return [choice.text for choice in reply.choices]

    first = texts()
    assert len(set(first)) == 4 and texts() == first


def test_log_probabilities_are_transformers(client: openai.OpenAI, smollm2: Any) -> None:
    """Of the prompt and of the text, from the whole model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    found = complete(client, logprobs=5, echo=True).choices[0]
    ids = tokenizer(found.text, return_tensors="pt")["input_ids"]
    assert len(ids[0]) == len(found.logprobs.tokens) and "".join(found.logprobs.tokens) == found.text
    with torch.inference_mode():
        expected = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    assert found.logprobs.token_logprobs[0] is None
    for at, token in enumerate(ids[0, 1:].tolist()):
        assert math.isclose(found.logprobs.token_logprobs[at + 1], expected[at, token].item(), abs_tol=2e-3)
        best = expected[at].topk(5).values.tolist()
        # The token itself stands there too, where it is none of the likeliest.
        reported = sorted(found.logprobs.top_logprobs[at + 1].values(), reverse=True)
        assert reported[:5] == pytest.approx(best, abs=2e-3) and len(reported) <= 6


def test_chat_log_probabilities_belong_to_its_tokens(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    for entry in content:  # greedy: the chosen one is the likeliest
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob <= 0


def test_stops(client: openai.OpenAI) -> None:
    free = complete(client, max_tokens=12).choices[0].text
    cut = complete(client, max_tokens=12, stop=[" six", "never"]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == free[: free.index(" six")]
    late = complete(client, max_tokens=12, stop=" six", extra_body={"min_tokens": 12}).choices[0]
    assert late.text == free and late.finish_reason == "length"


def test_token_stops_and_ignored_ends(client: openai.OpenAI) -> None:
    stopped = chat(client, extra_body={"stop_token_ids": [30]})  # token 30 is the full stop
    assert stopped.choices[0].message.content.endswith("Paris") and stopped.choices[0].finish_reason == "stop"
    endless = chat(client, max_tokens=14, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == 14 and endless.choices[0].finish_reason == "length"


def test_biased_and_penalized_tokens(client: openai.OpenAI, fp32: Served) -> None:
    comma = tokenize(fp32, ",")[0]
    assert complete(client, logit_bias={str(comma): 100}, max_tokens=5).choices[0].text == ",,,,,"
    assert "," not in complete(client, logit_bias={str(comma): -100}).choices[0].text
    prompt = "a b a b a b a b a b"
    free = complete(client, prompt=prompt, max_tokens=16).choices[0].text
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"extra_body": {"repetition_penalty": 2.0}}):
        other = complete(client, prompt=prompt, max_tokens=16, **penalty).choices[0].text
        assert len(set(tokenize(fp32, other))) > len(set(tokenize(fp32, free)))


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client: openai.OpenAI, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    messages = [{"role": "user", "content": "Invent a person."}]
    reply = chat(
        client, messages=messages, response_format=wanted, temperature=1.0, seed=1, max_tokens=100, stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    else:
        text = reply.choices[0].message.content
        assert reply.choices[0].finish_reason == "stop"
    person = json.loads(text)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120 and len(person["name"]) <= 12


def test_any_json_object_beside_a_free_neighbour(client: openai.OpenAI) -> None:
    reply = chat(client, response_format={"type": "json_object"}, n=2, temperature=1.0, seed=3, max_tokens=120)
    for choice in reply.choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        assert choice.message.content.startswith("{")


def test_a_repeated_prompt_is_not_computed_again(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Please repeat this sentence, which nobody else has sent before. 4711"}]
    first, second = (chat(client, messages=messages) for _ in range(2))
    assert second.choices[0].message.content == first.choices[0].message.content
    whole_pages = (second.usage.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert second.usage.prompt_tokens_details.cached_tokens == whole_pages > 0
    assert first.usage.prompt_tokens_details.cached_tokens < 40


@pytest.mark.parametrize(
    ("parameters", "code", "param"),
    [
        ({"model": "gpt-4"}, "model_not_found", "model"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "context_length_exceeded", "prompt"),
        ({"max_tokens": 8190}, "context_length_exceeded", "max_tokens"),
        ({"temperature": 3}, None, "temperature"),
        ({"logit_bias": {"49152": 1}}, None, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None, "tools"),
        ({"extra_body": {"best_of": 2}}, None, "best_of"),
        ({"n": 129}, None, "n"),
        ({"response_format": {"type": "json_schema", "json_schema": BAD_SCHEMA}}, None, "response_format"),
    ],
)
def test_errors_are_the_clients_own(client: openai.OpenAI, parameters: dict, code: str | None, param: str) -> None:
    kind = openai.NotFoundError if code == "model_not_found" else openai.BadRequestError
    with pytest.raises(kind) as caught:
        chat(client, **parameters)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.body["message"]  # type: ignore[index]


def test_paths_that_need_a_body_and_paths_that_do_not_exist(fp32: Served) -> None:
    assert httpx.get(f"{fp32.base_url}/completions").status_code == 400
    missing = httpx.get(f"{fp32.base_url}/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{fp32.base_url}/openapi.json").json()["openapi"].startswith("3.")
