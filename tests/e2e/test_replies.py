"""The three kinds of reply, through a real TorchServe."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Served, parse

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def reference(smollm2: Path):
    """transformers' own greedy text for a prompt, fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    def generate(prompt: str | list, new: int) -> str:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return generate


def test_plain_text_in_and_out(fp32: Served, reference) -> None:
    prompt = "The three primary colours are"
    response = httpx.post(fp32.url, content=prompt, headers={"content-type": "text/plain"}, timeout=120)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text == reference(prompt, 256)


def test_json_has_text_reason_and_counts(fp32: Served, reference) -> None:
    reply = fp32.ask({"prompt": "Once upon a time", "max_new_tokens": 20})
    assert reply.headers["content-type"].startswith("application/json")
    body = reply.json()
    assert body["text"] == reference("Once upon a time", 20)
    assert body["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["completion_tokens"] == 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + 20


def test_a_chat_ends_at_the_end_of_text(fp32: Served, reference) -> None:
    body = fp32.ask({"messages": PARIS, "max_new_tokens": 100}).json()
    assert "Paris" in body["text"]
    assert body["text"] == reference(PARIS, 100)
    assert body["finish_reason"] == "stop"


def test_a_stream_is_the_same_text_in_order(fp32: Served) -> None:
    body = {"messages": PARIS, "max_new_tokens": 100}
    whole = fp32.ask(body).json()
    events = parse(fp32.events(body))
    assert len(events) > 3
    assert "".join(event["text"] for event in events) == whole["text"]
    assert events[-1] == {"text": "", "finish_reason": whole["finish_reason"], "usage": whole["usage"]}
    assert all(set(event) == {"text"} and event["text"] for event in events[:-1])


def test_one_token_is_a_whole_reply_of_each_kind(fp32: Served) -> None:
    """A stream whose first frame is its last hangs TorchServe's clients unless it goes out as a plain reply."""
    body = {"prompt": "One two three", "max_new_tokens": 1}
    whole = fp32.ask(body).json()
    assert whole["usage"]["completion_tokens"] == 1
    events = parse(fp32.events(body))
    assert "".join(event["text"] for event in events) == whole["text"]


def test_emoji_and_cjk_come_whole(fp32: Served) -> None:
    body = {"prompt": "Repeat: 🙂🙃🎉 日本語 🎉🎉 日本語 🎉", "max_new_tokens": 40}
    whole = fp32.text(body)
    pieces = [event["text"] for event in parse(fp32.events(body))]
    assert "".join(pieces) == whole
    assert all("\ufffd" not in piece for piece in pieces[:-2])


def test_a_stop_string_is_cut_and_never_leaks(fp32: Served) -> None:
    body = {"prompt": "Count: one, two, three, four,", "max_new_tokens": 40}
    whole = fp32.text(body)
    stop = whole[10:14]
    assert fp32.ask({**body, "stop": stop}).json()["finish_reason"] == "stop"
    assert fp32.text({**body, "stop": [stop, "never there"]}) == whole[: whole.index(stop)]
    events = parse(fp32.events({**body, "stop": stop}))
    assert "".join(event["text"] for event in events) == whole[: whole.index(stop)]


def test_sampling_repeats_with_a_seed(fp32: Served) -> None:
    body = {"prompt": "My favourite animal is", "max_new_tokens": 24, "temperature": 1.2, "top_p": 0.95, "top_k": 100}
    first = fp32.text({**body, "seed": 11})
    assert first == fp32.text({**body, "seed": 11})
    assert len({first, fp32.text({**body, "seed": 12}), fp32.text({**body, "seed": 13})}) > 1
    assert fp32.text({**body, "temperature": 0, "top_k": 1}) == fp32.text(
        {"prompt": body["prompt"], "max_new_tokens": 24}
    )
