"""The largest reply is reckoned before it is made: never too small; what is too large is refused with the numbers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsserve.core.errors import RequestError
from dsserve.core.request import Limits, TokenEvent, TokenLogprob
from dsserve.protocol.bounds import REPLY_BYTES
from dsserve.protocol.routes import answer
from dsserve.protocol.served import ServedModel
from dsserve.sampling.grammar import GrammarCompiler

PIECES = ["a", "Ċ" * 40, "ðŁĻĤ", "ðŁ", "\x00"[:0] + "Ā" * 9, "é" * 5, '"' * 7, "word", "<end>", *"bcdefghijklmnopqrst"]
LEAST: dict[str, dict[str, Any]] = {
    "": {"prompt": "a"},
    "v1/completions": {"prompt": "a"},
    "v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}
TOOL = {"type": "function", "function": {"name": "f"}}
LIKELIEST = {"logprobs": True, "top_logprobs": 20}


def make_served(context: int = 8192) -> ServedModel:
    """A byte-level vocabulary with line feeds, zeros, quotes, emoji and parts of characters."""
    tokenizer = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(PIECES)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}<tool_call>"
    limits = Limits(context, 16, context - 1, max_running=64, max_waiting=64)
    return ServedModel("test", fast, limits, len(PIECES), GrammarCompiler(fast, len(PIECES), frozenset()))


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return make_served()


def read(path: str, body: dict[str, Any], served: ServedModel) -> Any:
    return answer(path, "r", {"body": {**LEAST[path], **body}}, "application/json", served)


def longest_reply(job: Any, served: ServedModel, logprobs: int | None, dice: random.Random) -> int:
    """Bytes of the reply where every text is as long as may be and of the longest tokens, in any order."""
    sent, ids = 0, list(range(len(PIECES)))
    longest = sorted(ids, key=lambda token: -len(served.token_text.bytes_of(token)))
    for request in job.requests:
        report: tuple[TokenLogprob, ...] = ()
        if logprobs is not None:
            top = tuple((token, -1.2345678901234567e-05) for token in longest[:logprobs])
            report = (TokenLogprob(longest[0], -1.2345678901234567e-05, top),)
        prompt = report * len(request.prompt_ids) if request.prompt_logprobs else ()
        for at in range(max(request.max_new_tokens, 1)):
            text = served.tokenizer.decode([dice.choice(ids)]) if at % 2 else served.tokenizer.decode([longest[0]])
            reason = "length" if at == max(request.max_new_tokens, 1) - 1 else None
            new = report if request.max_new_tokens else ()
            event = TokenEvent("r", text, request.index, reason, at + 1, 1, 0, new, prompt if at == 0 else ())  # type: ignore[arg-type]
            sent += len(job.reply.take(event))
    return sent


@pytest.fixture
def reckoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each request's reply was reckoned to be; none is refused."""
    sizes: list[int] = []

    def note(texts: Any, param: str) -> None:
        sizes.append(sum(text.size for text in texts))

    for place in ("openai.endpoints", "plain_endpoint"):
        monkeypatch.setattr(f"dsserve.protocol.{place}.check_reply", note)
    return sizes


@pytest.mark.parametrize("logprobs", [None, 0, 1, 5, 20])
@pytest.mark.parametrize("path", LEAST)
def test_no_reply_is_larger_than_reckoned(
    path: str, logprobs: int | None, served: ServedModel, reckoned: list[int]
) -> None:
    asked: dict[str, Any] = {"n": 3} if path else {}
    if logprobs is not None and path == "v1/completions":
        asked["logprobs"] = logprobs
    elif logprobs is not None and path:
        asked |= {"logprobs": True, "top_logprobs": logprobs}
    for length in (1, 7, 200):
        job = read(path, {"max_tokens" if path else "max_new_tokens": length, **asked}, served)
        sent = longest_reply(job, served, logprobs if path else None, random.Random(length))
        assert sent <= reckoned[-1] < 4 * sent + 3 * 1024


def test_an_echoed_prompt_is_reckoned_with_its_log_probabilities(served: ServedModel, reckoned: list[int]) -> None:
    for logprobs, body in ((None, {"max_tokens": 0}), (20, {"max_tokens": 5, "logprobs": 20, "n": 4})):
        prompts = [list(range(len(PIECES))), [1] * 90]
        job = read("v1/completions", {"prompt": prompts, "echo": True, **body}, served)
        assert longest_reply(job, served, logprobs, random.Random(0)) <= reckoned[-1]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("v1/completions", {"n": 16, "max_tokens": 8000, "logprobs": 20, "temperature": 1}, "max_tokens"),
        ("v1/completions", {"prompt": [1] * 8000, "echo": True, "n": 70, "max_tokens": 0}, "max_tokens"),
        ("v1/completions", {"prompt": [[1] * 4000, [4] * 8000] * 5, "echo": True, "n": 12}, "max_tokens"),
        ("v1/completions", {"prompt": [1] * 2000, "echo": True, "n": 64, "logprobs": 20}, "max_tokens"),
        ("v1/chat/completions", {"n": 128, "max_tokens": 8000}, "max_tokens"),
        ("v1/chat/completions", {"n": 8, "max_completion_tokens": 4000, **LIKELIEST}, "max_completion_tokens"),
        ("v1/chat/completions", {"n": 40, "max_tokens": 8000, "tools": [TOOL]}, "max_tokens"),
    ],
)  # fmt: skip
def test_a_reply_that_may_be_too_large_is_refused_and_may_be_streamed(
    path: str, body: dict[str, Any], param: str, served: ServedModel
) -> None:
    with pytest.raises(RequestError) as caught:
        read(path, body, served)
    error = caught.value
    assert error.status == 400 and error.param == param
    assert f"at most {REPLY_BYTES.most}" in error.message and f"lower {param}, n" in error.message
    if not body.get("echo"):
        assert read(path, {**body, "stream": True}, served).reply.is_stream


def test_lengths_that_people_ask_for_pass(served: ServedModel) -> None:
    for path, body in (
        ("", {"max_new_tokens": 8000}),
        ("v1/completions", {"max_tokens": 4000, "logprobs": 5, "n": 2}),
        ("v1/chat/completions", {"max_tokens": 8000}),
        ("v1/chat/completions", {"max_tokens": 512, "logprobs": True, "top_logprobs": 20}),
        ("v1/completions", {"prompt": [[1] * 500] * 16, "echo": True, "n": 1, "logprobs": 1, "max_tokens": 1}),
    ):
        assert read(path, body, served).requests


def test_token_ids_back_to_text_are_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    long = make_served(context=2**20)
    asked = {"body": {"tokens": [1] * 900_000}}
    with pytest.raises(RequestError, match="the reply may have") as caught:
        answer("v1/detokenize", "r", asked, "application/json", long)
    assert caught.value.param == "tokens"
    found = json.loads(answer("v1/detokenize", "r", {"body": {"tokens": [1] * 9}}, "application/json", long))  # type: ignore[arg-type]
    assert found["prompt"] == "\n" * 360
