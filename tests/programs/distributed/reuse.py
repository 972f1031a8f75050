"""What the ranks do for `test_reuse`: the same requests with and without pages of others, alone and together."""

from __future__ import annotations

from typing import Any

import torch

from dsserve.core.request import GenerationRequest, SamplingParams
from dsserve.engine.engine import Engine
from dsserve.kernels.ops import load_ops
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.pending import HostChoice
from tests.programs.distributed.steps import make_sharded
from tests.support.paged import make_engine, make_scheduler
from tests.support.streams import Numbers, more

ROWS, CONTEXT, NEW_TOKENS = 3, 128, 12
# A seed's number may fall between two sums of probabilities that differ in their rounding (4e-7 of all numbers,
# measured with seed 7): not with these.
SEED = 100
# Beginnings of a common text, so that later prompts find pages of texts that run and of ended ones; the last two
# share nothing.
SHARED_LENGTHS = (40, 60, 60, 61, 30, 17, 0, 0)
CACHED = 2 * (32 + 48 + 48 + 16 + 16)  # tokens of the whole pages that a text before has, greedy and sampled


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
    module = make_sharded(path, "fp32", device_type).module
    if device.type == "cuda":  # graphs need the fused writes to the cache
        assert load_ops(device) is not None
    found: dict[str, Any] = {"cached": 0}
    for sampled in (False, True):
        plain, reusing = (make(module, rank, device, reuse) for reuse in (False, True))
        wanted = requests(sampled, module.config.vocab_size)
        alone = [run(plain, rank, [request])[0][request.request_id] for request in wanted]
        together, cached = run(reusing, rank, wanted)
        name = "sampled" if sampled else "greedy"
        found[name] = {"alone": alone, "together": [together[request.request_id] for request in wanted]}
        found["cached"] += cached
    return found


def make(module: Any, rank: RankInfo, device: torch.device, reuse: bool) -> Engine:
    runner = ModelRunner(module, KVSize.of_rows(ROWS, CONTEXT), rank, device)
    sampler = DeviceSampler(runner.rows, runner.vocabulary, device)
    if device.type == "cuda":
        runner.capture_graphs(rank.is_leader, CONTEXT)
        sampler.capture(runner.graph_pool)
    launch = sampler.launch if reuse else HostChoice
    scheduler = make_scheduler(runner.size, reuse=reuse)
    return make_engine(runner, scheduler, lambda _: Numbers(), rank, launch=launch, launch_ahead=reuse)


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
