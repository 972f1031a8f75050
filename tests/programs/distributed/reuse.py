"""What the ranks do for `test_reuse`: the same requests with and without kept rows, alone and together."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.request import GenerationRequest, SamplingParams
from dsserve.engine.engine import Engine
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.autotp import ModelRunner
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.programs.distributed.steps import make_engine
from tests.support.streams import Numbers, more

SLOTS, CONTEXT, NEW_TOKENS = 3, 128, 12
# A seed's number may fall between two sums of probabilities that differ in their rounding (4e-7 of all numbers,
# measured with seed 7): not with these.
SEED = 100
# Beginnings of a common text, so that later prompts find live and kept rows; the last two share nothing.
SHARED_LENGTHS = (40, 60, 60, 61, 30, 17, 0, 0)


def requests(sampled: bool, vocabulary: int) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(9)
    common = torch.randint(vocabulary, (64,), generator=generator).tolist()
    made = []
    for index, shared in enumerate(SHARED_LENGTHS):
        own = torch.randint(vocabulary, (5 + index,), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=SEED + index) if sampled else SamplingParams()
        if sampled and index % 2:
            sampling = SamplingParams(temperature=1.2, repetition_penalty=1.2, presence_penalty=0.3, seed=SEED + index)
        made.append(GenerationRequest(str(index), (*common[:shared], *own), NEW_TOKENS, sampling))
    return made


def texts(path: str, device_type: str = "cpu") -> dict[str, Any]:
    """Tokens of each request in fp32: alone, without reuse and chosen on the host, and all arriving one by one, with
    reuse, chosen on the device and launched ahead. GPUs use graphs."""
    rank = RankInfo.from_env()
    device = select_device(device_type, rank)
    module = make_engine(path, "fp32", device_type).module
    found: dict[str, Any] = {"cached": 0}
    for sampled in (False, True):
        plain, reusing = (make_engine_of(module, rank, device, kept) for kept in (0, 2))
        wanted = requests(sampled, module.config.vocab_size)
        alone = [run(plain, rank, [request])[0][request.request_id] for request in wanted]
        together, cached = run(reusing, rank, wanted)
        name = "sampled" if sampled else "greedy"
        found[name] = {"alone": alone, "together": [together[request.request_id] for request in wanted]}
        found["cached"] += cached
    return found


def make_engine_of(module: Any, rank: RankInfo, device: torch.device, kept: int) -> Engine:
    runner = ModelRunner(module, SLOTS, CONTEXT, device, kept)
    sampler = DeviceSampler(runner.slots, runner.vocabulary, device)
    if device.type == "cuda":
        runner.capture_graphs(rank.is_leader)
        sampler.capture(runner.graph_pool)
    launch = sampler.launch if kept else HostChoice
    return Engine(  # type: ignore[arg-type, return-value]
        runner, rank, lambda _: Numbers(), frozenset(), launch=launch, launch_ahead=bool(kept)
    )


def run(engine: Engine, rank: RankInfo, arrivals: list[GenerationRequest]) -> tuple[dict[str, str], int]:
    """Each request arrives two calls after the one before. Texts, and the prompt tokens that were not computed."""
    texts = {request.request_id: "" for request in arrivals}
    open_, cached, calls = set(texts), 0, 0
    while more(rank, bool(open_)):
        if not rank.is_leader:
            engine.follow()
            continue
        if calls % 2 == 0 and calls // 2 < len(arrivals):
            engine.admit(arrivals[calls // 2])
        calls += 1
        for event in engine.run(max_steps=2):
            texts[event.request_id] += event.text
            if event.is_last:
                open_.discard(event.request_id)
                cached += event.cached_tokens
    return texts, cached
