"""What the ranks do for `test_parts`: long prompts read in parts beside running rows, and each request alone."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.request import GenerationRequest, SamplingParams, TokenEvent
from dsserve.engine.engine import Engine
from dsserve.kernels.ops import load_ops
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.modeling.linear import pack_weights
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.autotp import KVSize, ModelRunner
from tests.programs.distributed.steps import make_sharded
from tests.support.paged import make_engine, make_scheduler
from tests.support.streams import Numbers, more

ROWS, CONTEXT, PART = 4, 320, 32
LONG = 150  # tokens: five parts
# Name -> prompt tokens, new tokens, the call before which it comes. `short` and `gone` leave while `long` is read; the
# second half of `again` and all of `echo` are read in parts too.
ARRIVALS = {
    "first": (9, 24, 0),
    "short": (5, 5, 0),
    "gone": (7, 12, 1),
    "long": (LONG, 12, 3),
    "behind": (20, 6, 4),
    "again": (LONG + 40, 6, 12),
    "echo": (70, 3, 14),
    "left": (LONG, 6, 20),
}
CANCELLED = {"gone": 5, "left": 22}  # the call before which its client goes away


def requests(vocabulary: int) -> dict[str, GenerationRequest]:
    generator = torch.Generator().manual_seed(11)
    made: dict[str, GenerationRequest] = {}
    for name, (length, new, _) in ARRIVALS.items():
        prompt = torch.randint(vocabulary, (length,), generator=generator).tolist()
        if name == "again":  # begins like a request that ended
            prompt[:LONG] = made["long"].prompt_ids
        sampling = SamplingParams(logprobs=1) if name == "echo" else SamplingParams()
        made[name] = GenerationRequest(name, tuple(prompt), new, sampling, prompt_logprobs=name == "echo")
    return made


def texts(path: str, device_type: str = "cpu") -> dict[str, Any]:
    """In fp32, tokens of each request: alone and read whole, and all together in parts; who was answered in each call;
    the prompt's log probabilities both ways; how many tokens were reused."""
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    module = make_sharded(path, "fp32", device_type).module
    pack_weights(module)
    if device.type == "cuda":  # graphs need the fused writes to the cache
        assert use_fused_ops(module, load_ops(device))
    wanted = requests(module.config.vocab_size)
    whole = make(module, rank, device, reuse=False, step=CONTEXT)
    alone = {name: run(whole, rank, {name: request}, {}) for name, request in wanted.items()}
    together = run(make(module, rank, device, reuse=True, step=PART), rank, wanted, CANCELLED)
    events = [event for call in together for event in call]
    return {
        "alone": {name: tokens(calls, name) for name, calls in alone.items()},
        "together": {name: tokens(together, name) for name in wanted},
        "calls": [sorted(event.request_id for event in call) for call in together],
        "echo": [logprobs(together), logprobs(alone["echo"])],
        "cached": {event.request_id: event.cached_tokens for event in events if event.is_last},
    }


def make(module: Any, rank: RankInfo, device: torch.device, reuse: bool, step: int) -> Engine:
    runner = ModelRunner(module, KVSize.of_rows(ROWS, CONTEXT), rank, device)
    if device.type == "cuda":
        runner.capture_graphs(rank.is_leader, CONTEXT)
    return make_engine(runner, make_scheduler(runner.size, step, reuse=reuse), lambda _: Numbers(), rank)


def run(
    engine: Engine, rank: RankInfo, wanted: dict[str, GenerationRequest], cancelled: dict[str, int]
) -> list[list[TokenEvent]]:
    """Every call's events, a step a call; a request alone comes at once. Other ranks follow and return nothing."""
    calls: list[list[TokenEvent]] = []
    open_ = set(wanted)
    while more(rank, bool(open_)):
        if not rank.is_leader:
            engine.follow()
            continue
        for name, request in wanted.items():
            if len(calls) == (ARRIVALS[name][2] if len(wanted) > 1 else 0):
                engine.admit(request)
            if cancelled.get(name) == len(calls):
                engine.evict(name)
                open_.discard(name)
        calls.append(engine.run(max_steps=1))
        open_ -= {event.request_id for event in calls[-1] if event.is_last}
    return calls


def tokens(calls: list[list[TokenEvent]], name: str) -> list[int]:
    return [int(event.text) for call in calls for event in call if event.request_id == name]


def logprobs(calls: list[list[TokenEvent]]) -> list[tuple[int, float | None]]:
    found = (event.prompt_logprobs for call in calls for event in call if event.request_id == "echo")
    return [(logprob.token, logprob.logprob) for prompt in found for logprob in prompt]
