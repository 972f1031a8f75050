"""Requests of all kinds that come and leave at random times, and an engine that serves them: what tests of the same
texts on different ways share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.core.request import GenerationRequest, SamplingParams, StopConditions, TokenEvent
from dsserve.engine.detokenizer import TextStream
from dsserve.engine.engine import Engine
from dsserve.parallel.rank import RankInfo
from dsserve.sampling.gpu_draw import draw
from tests.support.streams import more

SLOTS, KEPT, PART, CONTEXT, EOS, VOCABULARY = 3, 2, 20, 48, 5, 40
# The prompts of a schedule begin alike, so that later ones take over what others computed.
COMMON = tuple(range(8, 34))
PLAIN = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 12},
    {"temperature": 1.1, "top_p": 0.8},
)
NARROW = {"temperature": 1.0, "min_p": 0.02}, {"temperature": 1.0, "top_k": 30, "typical_p": 0.8}
EDITED = {"temperature": 0.0, "repetition_penalty": 1.3}, {"temperature": 1.0, "min_tokens": 4}, {"logprobs": 2}


def make_llama() -> LlamaForCausalLM:
    """Random weights, large enough for texts to vary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def draw_less(share: float) -> Callable[..., torch.Tensor]:
    """A `sampling.gpu_draw.draw` that leaves so many of the sampled rows to the host; which ones lies in their
    numbers."""

    def draw_some(logits: torch.Tensor, numbers: torch.Tensor, with_rules: bool) -> torch.Tensor:
        left = ((numbers[:, 0] * 1000).frac() < share) & (numbers[:, 1] > 0)
        return draw(logits, numbers, with_rules).masked_fill(left, -1)

    return draw_some


class Spelled:
    """In a tokenizer's place: each token is its number and a space."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"{token} " for token in tokens)


def make_text(request: GenerationRequest) -> TextStream:
    return TextStream(Spelled(), request.stop.strings)


@dataclass
class Schedule:
    """Requests, the call before which each comes, the call before which some are given up, and steps of each call."""

    requests: dict[str, GenerationRequest]
    arrivals: dict[str, int]
    cancelled: dict[str, int]
    steps: list[int] = field(default_factory=lambda: [1])

    @classmethod
    def draw(cls, seed: int, count: int = 10) -> Schedule:
        """Most requests want nothing but tokens: only such steps can be launched ahead."""
        dice = random.Random(seed)
        kinds = [*PLAIN, *NARROW] * 4 + list(EDITED) * dice.randrange(2)
        made, arrivals, cancelled = {}, {}, {}
        for name in map(str, range(count)):
            own = tuple(dice.randrange(6, VOCABULARY) for _ in range(dice.randrange(1, 9)))
            prompt = (*COMMON[: dice.choice([0, 0, 18, 26])], *own)
            new = dice.choice([1, 2, 3, 8, 12, CONTEXT - len(prompt), CONTEXT - len(prompt)])
            sampling = SamplingParams(seed=dice.randrange(1000), **dice.choice(kinds))  # type: ignore[arg-type]
            strings = (f" {dice.randrange(VOCABULARY)} ",) if dice.random() < 0.2 else ()
            stop = StopConditions(strings, frozenset(dice.sample(range(VOCABULARY), 2)), dice.random() < 0.5)
            made[name] = GenerationRequest(name, prompt, new, sampling, stop)
            arrivals[name] = dice.randrange(14)
            if dice.random() < 0.2:
                cancelled[name] = arrivals[name] + dice.randrange(1, 8)
        if dice.random() < 0.3:  # the prompt alone, as long as a row
            prompt = tuple(dice.randrange(6, VOCABULARY) for _ in range(CONTEXT))
            made["echo"] = GenerationRequest("echo", prompt, 0, SamplingParams(logprobs=1), prompt_logprobs=True)
            arrivals["echo"] = dice.randrange(14)
        return cls(made, arrivals, cancelled, [dice.randrange(1, 6) for _ in range(7)])


@dataclass
class Played:
    """What the clients got: each one's events, by call; and how many calls it took."""

    events: list[list[TokenEvent]]

    def text(self, name: str) -> str:
        return "".join(event.text for call in self.events for event in call if event.request_id == name)

    def end(self, name: str) -> tuple[str | None, int, bool] | None:
        """Reason, tokens and failure of a text that ended."""
        ends = [event for call in self.events for event in call if event.request_id == name and event.is_last]
        assert len(ends) <= 1, "a text ends once"
        return (ends[0].finish_reason, ends[0].completion_tokens, ends[0].failed) if ends else None


def play(engine: Engine, rank: RankInfo, schedule: Schedule, cancel: bool = True) -> Played:
    """Runs a schedule to its end. Other ranks follow, and return nothing."""
    events: list[list[TokenEvent]] = []
    open_ = set(schedule.requests)
    while more(rank, bool(open_)):
        if not rank.is_leader:
            engine.follow()
            continue
        call = len(events)
        for name, request in schedule.requests.items():
            if schedule.arrivals[name] == call:
                engine.admit(request)
            if cancel and schedule.cancelled.get(name) == call:
                engine.evict(name)
                open_.discard(name)
        events.append(engine.run(schedule.steps[call % len(schedule.steps)]))
        open_ -= {event.request_id for event in events[-1] if event.is_last}
    return Played(events)


def differences(schedule: Schedule, expected: Played, found: Played) -> list[str]:
    """Requests whose texts are not the expected ones; of those that were given up a beginning is enough."""
    wrong = []
    for name in schedule.requests:
        gave_up = name in schedule.cancelled and found.end(name) is None
        same = expected.text(name).startswith(found.text(name)) if gave_up else expected.text(name) == found.text(name)
        if not same or not (gave_up or expected.end(name) == found.end(name)):
            wrong.append(f"{name}: {expected.text(name)}{expected.end(name)} {found.text(name)}{found.end(name)}")
    return wrong
