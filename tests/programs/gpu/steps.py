"""What the ranks do in the tests of this folder: greedy tokens of many requests through the engine.

Runs under torchrun, by `tests.support.ranks.run_ranks`, or in the test's own process as the only rank.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dsserve.config.handler import HandlerConfig
from dsserve.core.request import GenerationRequest
from dsserve.core.step_plan import StepPlan
from dsserve.kernels.ops import load_ops
from dsserve.loading.ds_engine import shard_model
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.modeling.optimize import tune
from dsserve.parallel.collectives import all_reduce
from dsserve.parallel.process_group import init_process_group
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.parallel.rank_sum import RankSum
from dsserve.parallel.symmetric_memory import share_memory
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.base import StepLogits
from dsserve.runner.step_graphs import MOST_TOKENS
from dsserve.runner.warmup import verify_runner
from dsserve.sampling.gpu_sampler import DeviceSampler
from tests.support.contexts import make_context
from tests.support.paged import make_engine, make_scheduler
from tests.support.streams import Numbers, run, run_or_fail

ROWS, CONTEXT, NEW_TOKENS = 4, 256, 24
LONG_PROMPT = 12_000  # tokens, whose activations take about 300 MB
LONG_TEXT, SHORT_TEXTS, SHORT_PROMPT = 20_000, 50, 120  # tokens, texts, tokens at most
PROMPT_LENGTHS = (1, 17, 5, 73, 40, 2, 33, 9)


def prompts(vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()) for n in PROMPT_LENGTHS]


def generate_in(dtypes: list[str], path: str, step: str) -> dict[str, Any]:
    """What `generate` gives in each dtype, one after the other in these processes: starting them takes longer."""
    found = {}
    for dtype in dtypes:
        found[dtype] = generate(path, dtype, step)
        torch.cuda.synchronize()  # other ranks than 0 do not wait for their last step, whose graph goes now
        gc.collect()
        torch.cuda.empty_cache()
    return found


def generate(path: str, dtype: str, step: str) -> dict[str, Any]:
    """Tokens of each prompt alone and of all together (twice as many as rows, admitted at different steps), and the
    engine's error against the unsharded model.

    Args:
        step: `eager`: torch's attention over copies; `paged`: our own over pages; `graphs`: that in graphs, of steps
            that decode alone; `fused`: all steps in graphs, with fused matmuls and operations. The last two are
            launched ahead.
    """
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    sharded = shard_model(model, make_context(path, {"deviceType": "gpu", "deepspeed": {"dtype": dtype}}))
    if step == "fused":
        said = tune(sharded.module, HandlerConfig(model_path=path, max_running=ROWS), rank, device, MOST_TOKENS)
        layers = model.config.num_hidden_layers
        assert f"{3 * layers + 2} fused operations, {layers} fused layers" in said
        assert rank.world_size == 1 or "in the ranks' memory" in said
    elif step != "eager":  # attention over pages needs the fused writes to the cache
        assert load_ops(device) is not None
    runner = ModelRunner(sharded.module, KVSize.of_rows(ROWS, CONTEXT), rank, device)
    assert runner.is_packed or step == "eager"
    if step in ("graphs", "fused"):
        runner.capture_graphs(rank.is_leader, MOST_TOKENS if step == "fused" else 0)
        assert runner.graph_pool is not None
    error = verify_runner(runner, sharded.self_check)
    sampler = DeviceSampler(runner.rows, runner.vocabulary, device)
    ahead = {"launch": sampler.launch, "launch_ahead": True} if runner.graph_pool else {}
    engine = make_engine(runner, make_scheduler(runner.size), lambda _: Numbers(), rank, **ahead)
    requests = [
        GenerationRequest(str(index), ids, NEW_TOKENS)
        for index, ids in enumerate(prompts(sharded.module.config.vocab_size))
    ]
    alone = [run(engine, rank, [[request]])[request.request_id] for request in requests]
    together = run(engine, rank, [requests[:3], requests[3:4], requests[4:]])
    return {
        "error": error,
        "device": str(next(sharded.module.parameters()).device),
        "alone": alone,
        "together": [together[request.request_id] for request in requests],
    }


def fill_memory(path: str) -> dict[str, Any]:
    """A short prompt's tokens and a long one's, or their errors' status: with memory enough, with 32 MiB free on the
    last rank, and with memory enough again."""
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    module = shard_model(model, make_context(path, {"deviceType": "gpu", "deepspeed": {"dtype": "fp32"}})).module
    assert load_ops(device) is not None
    runner = ModelRunner(module, KVSize.of_rows(2, LONG_PROMPT + 64), rank, device)
    scheduler = make_scheduler(runner.size, LONG_PROMPT, reuse=False)
    engine = make_engine(runner, scheduler, lambda _: Numbers(), rank)
    lengths = {"short": 9, "long": LONG_PROMPT}

    def answers() -> dict[str, Any]:
        arrivals = [[GenerationRequest(name, (7,) * length, NEW_TOKENS)] for name, length in lengths.items()]
        return run_or_fail(engine, rank, arrivals)

    found = {"before": answers()}
    torch.cuda.empty_cache()
    hog = None
    if rank.rank == rank.world_size - 1:
        hog = torch.empty(torch.cuda.mem_get_info(device)[0] - 2**25, dtype=torch.uint8, device=device)
    found["full"] = answers()
    del hog
    torch.cuda.empty_cache()
    found["after"] = answers()
    return found


def long_beside_short(path: str) -> dict[str, Any]:
    """fp32 tokens of a long text and of `SHORT_TEXTS` short ones: each alone, its prompt read whole without graphs, and
    all together, in parts and in graphs, launched ahead; how many parts the long prompt had."""
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    module = shard_model(model, make_context(path, {"deviceType": "gpu", "deepspeed": {"dtype": "fp32"}})).module
    assert use_fused_ops(module, load_ops(device))
    requests = long_and_short(module.config.vocab_size)
    size = KVSize(SHORT_TEXTS + 1, LONG_TEXT, 2 * -(-LONG_TEXT // 16))
    one = ModelRunner(module, KVSize.of_rows(1, LONG_TEXT), rank, device)
    alone = make_engine(one, make_scheduler(one.size, LONG_TEXT, reuse=False), lambda _: Numbers(), rank)
    runner = CountingParts(module, size, rank, device)
    runner.capture_graphs(rank.is_leader, MOST_TOKENS)
    sampler = DeviceSampler(runner.rows, runner.vocabulary, device)
    sampler.capture(runner.graph_pool)
    runner.parts = 0
    scheduler = make_scheduler(size, 8192, 1024)
    engine = make_engine(
        runner, scheduler, lambda _: Numbers(), rank, launch=sampler.launch, launch_ahead=True
    )  # fmt: skip
    half = 1 + SHORT_TEXTS // 2
    return {
        "alone": {request.request_id: run(alone, rank, [[request]])[request.request_id] for request in requests},
        "together": run(engine, rank, [requests[1:half], requests[:1], requests[half:]]),
        "parts": runner.parts,
    }


class CountingParts(ModelRunner):
    """Counts segments of more tokens than any short prompt has."""

    parts = 0

    def execute(self, plan: StepPlan, chosen: torch.Tensor | None = None) -> StepLogits | None:
        """See `ModelRunner`."""
        self.parts += sum(len(segment.tokens) > SHORT_PROMPT for segment in plan.segments)
        return super().execute(plan, chosen)


def long_and_short(vocabulary: int) -> list[GenerationRequest]:
    """The long one first, to the model's last position."""
    generator = torch.Generator().manual_seed(6)
    lengths = [LONG_TEXT - NEW_TOKENS, *(1 + 7 * number % SHORT_PROMPT for number in range(SHORT_TEXTS))]
    return [
        GenerationRequest(
            str(at), tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()), NEW_TOKENS
        )
        for at, length in enumerate(lengths)
    ]


def sum_parts(cases: list[tuple[list[int], int, str, int]]) -> list[dict[str, Any]]:
    """Sums of each case: row counts, their width, dtype, rounds. What each found is as of `sum_case`."""
    rank = RankInfo.from_env()
    device = select_device("gpu", rank)
    torch.cuda.set_device(device)
    init_process_group(rank)
    return [sum_case(rank, device, counts, width, getattr(torch, kind), n) for counts, width, kind, n in cases]


def sum_case(
    rank: RankInfo, device: torch.device, counts: list[int], width: int, kind: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Sums, additions and norms of random parts in the ranks' memory, and by NCCL in fp64: a CUDA graph of two for each
    row count, which take turns in one memory.

    Returns:
        In how many rounds they were right, and on all ranks the same. With two ranks: bit for bit; with more the
        kernel's sums in fp32 may round to the next number.
    """
    most = max(counts)
    peers = share_memory(rank, most, width, kind, device)
    ours, alone = [RankSum(rank.world_size, peer) for peer in peers], RankSum(1, None)
    eps = torch.finfo(kind).eps

    def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        if rank.world_size == 2:
            return torch.equal(one, other)
        return torch.allclose(one, other, rtol=4 * eps, atol=16 * eps)

    parts = torch.zeros(2, most, width, dtype=kind, device=device)
    residual, weight = torch.randn(most, width, device=device).to(kind), torch.randn(width, device=device).to(kind)
    all_reduce(residual), all_reduce(weight)  # the same on all ranks

    def add_two(rows: int) -> list[torch.Tensor]:
        found = []
        for part, rank_sum in zip(parts, ours, strict=True):
            memory = rank_sum.take(rows)
            assert memory is not None
            found += rank_sum.add_norm(memory.copy_(part[:rows]), residual[:rows], weight, 1e-6)
        return found

    graphs = {rows: torch.cuda.CUDAGraph() for rows in counts}
    results = {}
    for rows, graph in graphs.items():
        add_two(rows)
        with torch.cuda.graph(graph):
            results[rows] = add_two(rows)
    generator = torch.Generator(device).manual_seed(rank.rank)
    right = 0
    for number in range(rounds):
        rows = counts[number % len(counts)]
        parts.copy_(torch.randn(parts.shape, generator=generator, device=device))
        graphs[rows].replay()
        found = results[rows]
        sums = [all_reduce(part[:rows].double()).to(kind) for part in parts]
        expected = [tensor for total in sums for tensor in alone.add_norm(total, residual[:rows], weight, 1e-6)]
        same = [torch.empty_like(found[1]) for _ in range(rank.world_size)]
        torch.distributed.all_gather(same, found[1])
        equal = all(are_equal(*pair) for pair in zip(found, expected, strict=True))
        right += equal and all(torch.equal(found[1], other) for other in same)
    for graph in graphs.values():
        graph.reset()
    return {"places": len(peers), "right": right}
