"""What the ranks do for the tests of the injected engine: requests through `Engine`, over the stand-in of the kernels.

Runs under torchrun, by `tests.support.ranks.run_ranks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.core.request import GenerationRequest, SamplingParams
from dsserve.engine.batch_scheduler import BatchScheduler
from dsserve.engine.engine import Engine
from dsserve.loading.ds_engine import shard_model
from dsserve.modeling.self_check import answers
from dsserve.parallel.rank import RankInfo, select_device
from dsserve.runner.kernel_injection import KernelRunner
from dsserve.runner.warmup import warm_up_batches
from tests.programs.injection.cell import forget_kernels
from tests.programs.injection.models import SIZES, make_model
from tests.support.contexts import make_context
from tests.support.paged import make_engine
from tests.support.streams import Numbers, more, run

NEW_TOKENS = 9
PROMPT_LENGTHS = (1, 17, 5, 30, 2, 11, 1, 8, 25)


def load(name: str, inject: bool | str, device_type: str = "cpu", dtype: str = "fp32") -> tuple[Any, Any]:
    """The model as transformers has it, and the same, sharded."""
    if device_type == "cpu":
        from tests.programs.injection.kernels import install

        install()
    device = select_device(device_type, RankInfo.from_env())
    size = "tiny" if device_type == "cpu" else "real"
    weights = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    reference = make_model(name, size, weights, str(device))
    settings = {"dtype": dtype, "replace_with_kernel_inject": inject, "max_out_tokens": SIZES[size].tokens}
    context = make_context(".", {"deviceType": device_type, "deepspeed": settings})
    model = make_model(name, size, weights, str(device)).to("cpu", weights)
    engine = shard_model(model, context, max_batch=SIZES[size].rows)
    if device_type == "cpu":
        torch.set_num_threads(1)
    return reference, engine


def requests(vocabulary: int) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(3)
    return [
        GenerationRequest(str(at), tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()), new)
        for at, (length, new) in enumerate(zip(PROMPT_LENGTHS, (9, 3, 9, 9, 1, 9, 20, 5, 9), strict=True))
    ]


def streams(name: str, device_type: str = "cpu", dtype: str = "fp32") -> dict[str, Any]:
    """Tokens of requests that arrive while others run, alone, and as transformers' `generate` has them."""
    rank = RankInfo.from_env()
    reference, sharded = load(name, True, device_type, dtype)
    size = sharded.workspace.size
    runner = KernelRunner(sharded.module, size, size.tokens, rank, next(sharded.module.parameters()).device)
    warm_up_batches(runner, rank.is_leader)
    scheduler = BatchScheduler(size.rows, size.tokens)
    engine = make_engine(runner, scheduler, lambda _: Numbers(), rank)
    wanted = requests(reference.config.vocab_size)
    together = run(engine, rank, [wanted[:2], wanted[2:3], wanted[3:7], [], wanted[7:]])
    alone = [run(engine, rank, [[request]])[request.request_id] for request in wanted]
    left = _leave(engine, rank, wanted)
    logprobs = _prompt_logprobs(engine, rank, wanted)
    return {
        "together": [together[request.request_id] for request in wanted],
        "alone": alone,
        "generated": [_generate(reference, request) for request in wanted],
        "left": left,
        "logprobs": logprobs,
        "expected_logprobs": _expected_logprobs(reference, wanted[1]),
    }


def _generate(reference: Any, request: GenerationRequest) -> list[int]:
    ids = torch.tensor([request.prompt_ids], device=reference.device)
    with torch.inference_mode():
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return output[0, len(request.prompt_ids) :].tolist()


def _leave(engine: Engine, rank: RankInfo, wanted: list[GenerationRequest]) -> dict[str, Any]:
    """Two rows run, one's client goes, a third request waits until the other has ended."""
    found: dict[str, Any] = {"0": "", "2": "", "5": "", "running": []}
    calls, open_ = 0, True
    while more(rank, open_):
        if not rank.is_leader:
            engine.follow()
            continue
        if calls == 0:
            for at in (0, 2):
                engine.admit(wanted[at])
        if calls == 2:
            engine.evict("0")
            engine.admit(wanted[5])
        calls += 1
        for event in engine.run(max_steps=2):
            found[event.request_id] += event.text
        found["running"].append((engine.running, engine.waiting))
        open_ = calls < 2 or engine.running + engine.waiting > 0
    return found


def _prompt_logprobs(engine: Engine, rank: RankInfo, wanted: list[GenerationRequest]) -> list[float]:
    """The log probabilities of one prompt's tokens, padded beside a longer prompt."""
    asking = GenerationRequest("asking", wanted[1].prompt_ids, 1, SamplingParams(logprobs=0), prompt_logprobs=True)
    found: list[float] = []
    open_ = {"asking", "3"}
    first = True
    while more(rank, bool(open_)):
        if not rank.is_leader:
            engine.follow()
            continue
        if first:
            engine.admit(asking)
            engine.admit(wanted[3])
            first = False
        for event in engine.run(max_steps=4):
            found += [logprob.logprob for logprob in event.prompt_logprobs if logprob.logprob is not None]
            open_ -= {event.request_id} if event.is_last else set()
    return found


@torch.inference_mode()
def _expected_logprobs(reference: Any, request: GenerationRequest) -> list[float]:
    ids = torch.tensor(request.prompt_ids, device=reference.device)
    logprobs = reference(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[:, 0].tolist()


def fall_back(name: str, wrong: bool) -> dict[str, Any]:
    """`auto` with the kernels, or with wrong ones: the engine that serves, why, and its error."""
    with _repairs_missing() if wrong else contextlib.nullcontext():
        reference, engine = load(name, "auto")
    tokens = torch.arange(20)
    with torch.inference_mode():
        found, wanted = answers(engine.module, tokens), answers(reference, tokens)
    error = float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))
    return {"engine": "kernels" if engine.workspace else "autotp", "why": engine.injection_refused, "error": error}


@contextlib.contextmanager
def _repairs_missing() -> Iterator[None]:
    import dsserve.injection.inject as inject

    original, inject.replace_operations = inject.replace_operations, lambda *_: []  # type: ignore[assignment]
    try:
        yield
    finally:
        inject.replace_operations = original


def loads() -> dict[str, Any]:
    """What one rank's loads come to: kernels that are right, wrong ones under `true`, weights of another dtype."""
    found: dict[str, Any] = {"auto": fall_back("opt", wrong=False)}
    forget_kernels()
    try:
        with _repairs_missing():
            load("llama", True)
    except LoadError as error:
        found["true"] = str(error)
    for name in ("gpt2", "llama-gqa"):
        forget_kernels()
        found[name] = converted(name)
    return found


def converted(name: str) -> dict[str, Any]:
    """A model in fp32 that is served in bf16: dtypes of what the kernels got, and whether the weights are the same."""
    from tests.programs.injection.kernels import install

    install()
    model = make_model(name, "tiny", torch.float32, "cpu")
    embedding = model.get_input_embeddings().weight.detach().clone()
    settings = {"dtype": "bf16", "replace_with_kernel_inject": True, "max_out_tokens": 32, "self_check": False}
    module = shard_model(model, make_context(".", {"deviceType": "cpu", "deepspeed": settings}), max_batch=2).module
    return {
        "dtypes": sorted({str(parameter.dtype) for parameter in module.parameters()}),
        "equal": bool((module.get_input_embeddings().weight == embedding.bfloat16()).all()),
    }
