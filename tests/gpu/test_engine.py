"""The AutoTP engine on real GPUs against transformers' `generate` on the same weights. `make test` leaves them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsserve.modeling.self_check import TOLERANCE
from dsserve.runner.autotp import PAGE_TOKENS
from tests.programs.distributed.parts import ARRIVALS, CANCELLED, LONG
from tests.programs.distributed.reuse import CACHED
from tests.programs.gpu.steps import LONG_TEXT, NEW_TOKENS, SHORT_TEXTS, generate, long_and_short, prompts
from tests.support.ranks import run_ranks
from tests.support.schedules import make_llama

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SERVED = ("fp32", "fp16", "bf16")
pytestmark = needs_gpu


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with grouped KV heads; weights large enough for its tokens to differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["tp1", "tp2", "tp4"])
def ranks(request: pytest.FixtureRequest) -> int:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed, {torch.cuda.device_count()} visible")
    return request.param


@pytest.fixture(scope="module", params=["fused", "graphs", "paged", "eager"])
def results(request: pytest.FixtureRequest, llama: str, ranks: int) -> dict[str, dict]:
    """Rank 0's results for each dtype."""
    arguments = {"env": {"DS_ACCELERATOR": "cuda"}, "path": llama, "step": request.param}
    return run_ranks("tests.programs.gpu.steps:generate_in", ranks, dtypes=list(SERVED), **arguments)[0]


def load(path: str, dtype: str) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval().to("cuda")
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def reference(path: str, dtype: str) -> list[list[int]]:
    model = load(path, dtype)
    texts = []
    for ids in prompts(model.config.vocab_size):
        tokens = torch.tensor([ids], device="cuda")
        mask = torch.ones_like(tokens)
        output = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        texts.append(output[0, len(ids) :].tolist())
    return texts


@torch.inference_mode()
def assert_equal_up_to_ties(
    path: str, dtype: str, found: list[list[int]], expected: list[list[int]], texts: list[tuple[int, ...]] | None = None
) -> None:
    """At the first difference the two tokens' exact logits are no further apart than the dtype moves logits there.

    Args:
        texts: the prompts; default: those of `prompts`.
    """
    model, exact = load(path, dtype), load(path, "fp64" if dtype == "fp32" else "fp32")
    for ids, one, other in zip(texts or prompts(model.config.vocab_size), found, expected, strict=True):
        if one == other:
            continue
        at = next(index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        tokens = torch.tensor([[*ids, *one[:at]]], device="cuda")
        logits = exact(tokens).logits[0, -1]
        error = (model(tokens).logits[0, -1].to(logits) - logits).abs().max()
        assert (logits[one[at]] - logits[other[at]]).abs() <= 2 * error


@pytest.mark.parametrize("dtype", SERVED)
def test_logits_are_the_unsharded_models(results: dict[str, dict], dtype: str) -> None:
    assert results[dtype]["device"] == "cuda:0"
    assert results[dtype]["error"] < (1e-5 if dtype == "fp32" else TOLERANCE[DTYPES[dtype]])


def test_fp32_tokens_are_transformers_alone_and_among_others(llama: str, results: dict[str, dict]) -> None:
    expected = reference(llama, "fp32")
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert results["fp32"]["alone"] == expected
    assert results["fp32"]["together"] == expected


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_tokens_differ_at_ties_only(llama: str, results: dict[str, dict], dtype: str) -> None:
    assert_equal_up_to_ties(llama, dtype, results[dtype]["together"], results[dtype]["alone"])
    assert_equal_up_to_ties(llama, dtype, results[dtype]["alone"], reference(llama, dtype))


def test_one_process_without_torchrun_is_one_rank(llama: str, ranks: int, results: dict[str, dict]) -> None:
    if ranks > 1:
        pytest.skip("one rank is what this is about")
    assert generate(llama, "fp32", "graphs")["together"] == results["fp32"]["together"]


def test_reuse_sampling_and_neighbours_change_no_token(llama: str, ranks: int) -> None:
    """fp32, graphs, pages of other texts, requests that join in mid-stream; greedy and sampled."""
    arguments = {"env": {"DS_ACCELERATOR": "cuda"}, "path": llama, "device_type": "gpu"}
    found = run_ranks("tests.programs.distributed.reuse:texts", ranks, **arguments)[0]
    assert found["cached"] == CACHED
    for kind in ("greedy", "sampled"):
        assert found[kind]["together"] == found[kind]["alone"]


def test_a_long_prompt_in_parts_changes_no_token_and_stops_nobody(llama: str, ranks: int) -> None:
    """fp32, decode and parts in graphs; rows that end, clients that leave and a beginning that is reused on the way."""
    arguments = {"env": {"DS_ACCELERATOR": "cuda"}, "path": llama, "device_type": "gpu"}
    found = run_ranks("tests.programs.distributed.parts:texts", ranks, **arguments)[0]
    for name, alone in found["alone"].items():
        together = found["together"][name]
        assert together == alone[: len(together)]
        assert name in CANCELLED or len(together) == len(alone)
    begun = next(at for at, call in enumerate(found["calls"]) if "first" in call)
    assert all("first" in call for call in found["calls"][begun : begun + ARRIVALS["first"][1]])
    assert found["cached"]["again"] == LONG // PAGE_TOKENS * PAGE_TOKENS


def test_a_prompt_that_does_not_fit_into_memory_fails_alone(llama: str, ranks: int) -> None:
    found = run_ranks("tests.programs.gpu.steps:fill_memory", ranks, env={"DS_ACCELERATOR": "cuda"}, path=llama)[0]
    assert found["full"]["long"] in (507, found["before"]["long"]), "it is read in smaller parts, or refused"
    assert found["full"]["short"] == found["before"]["short"]
    assert found["after"] == found["before"] and len(found["before"]["long"].split()) == NEW_TOKENS


def test_texts_that_lose_their_pages_are_those_of_each_alone(tmp_path: Path, ranks: int) -> None:
    """fp32, graphs, steps that are launched ahead and others: pages for a part of the texts, which are put back."""
    make_llama().save_pretrained(tmp_path)
    arguments = {"env": {"DS_ACCELERATOR": "cuda"}, "path": str(tmp_path), "device_type": "gpu"}
    found = run_ranks("tests.programs.distributed.preemption:texts", ranks, seeds=list(range(100, 108)), **arguments)
    assert found[0]["differences"] == []
    assert sum(count > 0 for count in found[0]["preemptions"]) > 4
    assert all(rank["plans"] == found[0]["plans"] for rank in found)


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small one whose context is one long text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=LONG_TEXT, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("long")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_long_text_beside_many_short_ones_changes_no_token(long_llama: str, ranks: int) -> None:
    """fp32: 20,000 tokens in parts beside 50 texts, in graphs; each alone, whole; the long one by transformers, too."""
    program = "tests.programs.gpu.steps:long_beside_short"
    found = run_ranks(program, ranks, env={"DS_ACCELERATOR": "cuda"}, path=long_llama)[0]
    assert found["together"].keys() == found["alone"].keys() and len(found["alone"]) == 1 + SHORT_TEXTS
    assert all(len(tokens) == NEW_TOKENS for tokens in found["alone"].values())
    assert len({tuple(tokens) for tokens in found["alone"].values()}) > SHORT_TEXTS // 2
    assert found["parts"] > 10, "the long prompt was not read in parts"
    model = load(long_llama, "fp32")
    requests = long_and_short(model.config.vocab_size)
    pairs = [(found["together"][request.request_id], found["alone"][request.request_id]) for request in requests]
    one, other = map(list, zip(*pairs, strict=True))
    assert sum(mine != theirs for mine, theirs in pairs) <= 2, "ties are rare"
    assert_equal_up_to_ties(long_llama, "fp32", one, other, [request.prompt_ids for request in requests])
    tokens = torch.tensor([requests[0].prompt_ids], device="cuda")
    with torch.inference_mode():
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    assert found["together"]["0"] == output[0, tokens.shape[1] :].tolist()
