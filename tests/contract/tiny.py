"""Tiny random models as folders, a handler that loads one in process, and what transformers makes of the same prompts.

Three layers, 64 wide, a vocabulary of 512 and a byte-level tokenizer: a load takes a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import deepspeed_handler
from dsserve.core.request import GenerationRequest, SamplingParams, StopConditions
from tests.support import tiny_models
from tests.support.contexts import make_context
from tests.support.tiny_models import VOCABULARY, save_config

NEW = 12
# Weights so large that attention, and where it ends, matters for each token.
SHAPE: dict[str, Any] = {**tiny_models.SHAPE, "initializer_range": 0.3}


def save_model(folder: Path, model_type: str, **members: Any) -> Path:
    """A random model in fp32 with its tokenizer; `members` change or extend its config."""
    return save_config(folder, AutoModelForCausalLM, AutoConfig.for_model(model_type, **{**SHAPE, **members}))


def load(folder: Path, **settings: Any) -> deepspeed_handler.DeepSpeedHandler:
    """The handler, with `settings` under `handler:`."""
    handler = deepspeed_handler.DeepSpeedHandler()
    section = {"model_path": str(folder), "max_running": 3, "warmup": False, **settings}
    server = {"continuousBatching": True, "parallelType": "tp", "minWorkers": 1, "maxWorkers": 1, "deviceType": "cpu"}
    handler.initialize(make_context(folder, {**server, "deepspeed": {"dtype": "fp32"}, "handler": section}))
    return handler


def prompts(lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def served(handler: deepspeed_handler.DeepSpeedHandler, asked: list[tuple[int, ...]], new: int) -> list[list[Any]]:
    """(token, log probability) of each new token of each prompt, all sent at once."""
    engine = handler._leader.engine
    for number, prompt in enumerate(asked):
        sampling, stop = SamplingParams(logprobs=1), StopConditions(ignore_eos=True)
        engine.admit(GenerationRequest(str(number), prompt, new, sampling, stop))
    found: list[list[Any]] = [[] for _ in asked]
    open_ = {str(number) for number in range(len(asked))}
    while open_:
        for event in engine.run(max_steps=4):
            assert not event.failed
            found[int(event.request_id)] += [(one.token, one.logprob) for one in event.logprobs]
            open_ -= {event.request_id} if event.is_last else set()
    return found


@torch.no_grad()
def assert_transformers_says(folder: Path, asked: list[tuple[int, ...]], found: list[list[Any]]) -> None:
    """Each token is the likeliest of the whole model, which reads the text anew, with the same log probability."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, tokens in zip(asked, found, strict=True):
        text = torch.tensor([[*prompt, *(token for token, _ in tokens)]])
        for at, (token, logprob) in enumerate(tokens, start=len(prompt)):
            expected = model(text[:, :at], use_cache=False).logits[0, -1].log_softmax(-1)
            assert token == int(expected.argmax()), (len(prompt), at)
            assert abs(logprob - expected[token].item()) < 1e-3, (len(prompt), at)
