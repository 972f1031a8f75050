"""How many KV rows are planned for how much memory, what a refusal suggests, and what a pass is measured to take."""

from __future__ import annotations

import gc
import re
import weakref
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.config import AUTO_RUNNING, HandlerConfig
from dsserve.distributed import RankInfo
from dsserve.errors import LoadError
from dsserve.generation import kv_plan
from dsserve.generation.build import _memory_errors_explained
from dsserve.generation.kv_plan import KVPlan, measure_passes, measure_token, plan_kv_rows
from dsserve.generation.limits import read_limits
from dsserve.generation.model_runner import ModelRunner
from dsserve.generation.prefill_memory import PrefillMemory

GIB = 2**30
ALONE = RankInfo(0, 0, 1, 1)
# 2 x 80 layers x 8 KV heads x 128 values of 2 bytes: 320 KiB a token.
LARGE = LlamaConfig(num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_size=8192)
A_TOKEN = 320 * 2**10


def plan(free: float, passes: float = 0, ranks: int = 1, **handler: Any) -> KVPlan:
    """The plan of the large model in bf16 with so many GiB free for each of the ranks."""
    config = HandlerConfig(model_path="m", **{"max_model_len": 4096, **handler})
    limits, rank = read_limits(config, None, LARGE), RankInfo(0, 0, ranks, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free * GIB * ranks)))
        patch.setattr(kv_plan, "agree_on_least", lambda value, rank: value)
        sizes = (torch.bfloat16, rank, torch.device("cpu"), int(passes * GIB * ranks))
        return plan_kv_rows(LARGE, config, limits, *sizes)


def test_rows_take_their_share_of_what_passes_leave() -> None:
    """A row of 4096 tokens is 1.25 GiB."""
    assert plan(100) == KVPlan(16, 8, 24 * 4096 * A_TOKEN)
    assert (plan(27).slots, plan(27).kept) == (16, 3)
    assert (plan(27, passes=2).slots, plan(27, passes=2).kept) == (16, 2)
    assert (plan(27, kv_memory_fraction=0.5).slots, plan(27, kv_memory_fraction=0.5).kept) == (10, 0)
    assert plan(12.5, ranks=2).slots == 16 and plan(100, max_running=2, prefix_cache_rows=3).kept == 3


def test_auto_gives_the_slots_that_fit_and_named_ones_must() -> None:
    """70 billion parameters in bf16 on two GPUs of 80 GB leave some 12 GiB each, where a rank's row is 0.63 GiB."""
    assert plan(12.3, passes=1.1, ranks=2).slots == 16
    assert plan(6, passes=1, ranks=2).slots == 7
    said = r"need 20.00 GiB of KV cache; of 12.00 GiB free, 2.00 of them for passes, it may take 9.00 GiB .*: set "
    with pytest.raises(LoadError, match=said + "handler.max_running: 7 or handler.max_model_len: 1840$"):
        plan(6, passes=1, ranks=2, max_running=16)
    with pytest.raises(LoadError, match=r"set handler\.max_model_len: 2944$"):
        plan(1.0)
    with pytest.raises(LoadError, match="more ranks"):
        plan(1, passes=0.999)


@settings(deadline=None)
@given(
    st.floats(0.01, 200), st.floats(0, 20), st.sampled_from(["auto", 1, 5, 64]), st.sampled_from(["auto", 0, 3]),
    st.integers(2, 9000), st.floats(0.1, 1), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_a_plan_keeps_within_its_share_and_a_refusal_names_what_fits(
    free: float, passes: float, running: Any, kept: Any, length: int, fraction: float, ranks: int
) -> None:
    handler = {
        "max_running": running, "prefix_cache_rows": kept, "max_model_len": length, "kv_memory_fraction": fraction,
        "max_new_tokens": 1,
    }  # fmt: skip
    share = max(0.0, free - passes) * fraction * GIB
    try:
        found = plan(free, passes, ranks, **handler)
    except LoadError as error:
        for key, value in re.findall(r"handler\.(max_running|max_model_len): (\d+)", str(error)):
            found = plan(free, passes, ranks, **{**handler, key: int(value)})
            assert found.nbytes <= share + 1
        return
    assert found.nbytes <= share + 1
    assert found.slots == running or (running == "auto" and 1 <= found.slots <= AUTO_RUNNING)
    assert found.kept == kept or (kept == "auto" and found.kept <= 8)


@pytest.fixture
def module() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's, in which a pass takes 1000 bytes for each of 64 tokens."""
    monkeypatch.setattr(PrefillMemory, "is_limited", True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + 64 * 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)


@pytest.mark.usefixtures("allocator")
def test_a_pass_is_measured_and_nothing_of_it_stays(module: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = []
    monkeypatch.setattr(kv_plan, "ModelRunner", lambda *a, **k: remember(runners, ModelRunner(*a, **k)))
    gc.disable()
    try:
        assert measure_token(module, 50, ALONE, torch.device("cpu")) == (1000.0, False)
    finally:
        gc.enable()
    assert runners and all(kept() is None for kept in runners)


def remember(seen: list[Any], runner: ModelRunner) -> ModelRunner:
    seen += [weakref.ref(runner), weakref.ref(runner.cache)]
    return runner


@pytest.mark.parametrize(
    ("by_span", "graphs", "longest", "tokens", "rows"),
    [
        # Captured passes, and one beside them. Decode: 31 rows for 9 lengths; prompts: 8 and 16 for each of 15 lengths,
        # 16 short ones for 5 of them.
        (True, True, 32000, 4096 + 4096, 31 * 9 + 15 * 24 + 5 * 16),
        (True, False, 32000, 4096, 0),
        (False, False, 32000, 31999, 0),  # a long prompt's parts read it under a mask: counted whole
        (False, True, 32000, 31999 + 256, 31 * 9 + (7 + 3 * 4) * 16),
        (False, False, 100, 4096, 0),  # several prompts in a pass
        (True, True, 100, 4096 + 1792, 31 + 12 * 24 + 2 * 16),  # 16 prompts of 99 tokens are the most that can come
    ],
)
def test_what_is_left_for_passes(
    by_span: bool, graphs: bool, longest: int, tokens: int, rows: int, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_plan, "measure_token", lambda *_: (10.0, by_span))
    monkeypatch.setattr(kv_plan, "uses_decode_attention", lambda module: True)
    config = HandlerConfig(model_path="m", max_model_len=longest, max_new_tokens=1, cuda_graphs=graphs)
    limits = read_limits(config, None, LARGE)
    found = measure_passes(module, config, limits, 4096, ALONE, torch.device("cuda"))
    assert found == 10 * tokens + rows * 50 * 4  # fp32 logits of 50 tokens
    assert measure_passes(module, config, limits, 4096, ALONE, torch.device("cpu")) == 0


def test_memory_that_runs_out_at_load_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 4, 80 * GIB))
    config = HandlerConfig(model_path="m")
    with (
        pytest.raises(LoadError, match=r"0.25 of 80.0 GiB are free; lower handler.kv_memory_fraction \(0.9\)"),
        _memory_errors_explained(config, torch.device("cuda:0")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
