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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsserve.config.handler import AUTO_RUNNING, HandlerConfig
from dsserve.config.limits import read_limits
from dsserve.core.errors import LoadError
from dsserve.engine.build import _memory_errors_explained
from dsserve.parallel.rank import RankInfo
from dsserve.runner import kv_memory
from dsserve.runner.activation_memory import PrefillMemory
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.kv_memory import KVPlan, measure_passes, plan_kv_rows
from scripts.model.random import make_config

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
        patch.setattr(kv_memory, "agree_on_least", lambda value, rank: value)
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
    said = (
        r"need 20.00 GiB of KV cache; of 12.00 GiB free, 2.00 of them for passes and graphs, it may take 9.00 .*: set "
    )
    with pytest.raises(LoadError, match=said + "handler.max_running: 7 or handler.max_model_len: 1840$"):
        plan(6, passes=1, ranks=2, max_running=16)
    with pytest.raises(LoadError, match=r"set handler\.max_model_len: 2944$"):
        plan(1.0)
    with pytest.raises(LoadError, match=r"set handler.prefix_cache_rows: 3 or handler.max_model_len: 848$"):
        plan(7, max_running=2, prefix_cache_rows=22)
    with pytest.raises(LoadError, match="use more ranks"):
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
        for key, value in re.findall(r"handler\.(\w+): (\d+)", str(error)):
            found = plan(free, passes, ranks, **{**handler, key: int(value)})
            assert found.nbytes <= share + 1
        return
    assert found.nbytes <= share + 1
    assert found.slots == running or (running == "auto" and 1 <= found.slots <= AUTO_RUNNING)
    assert found.kept == kept or (kept == "auto" and found.kept <= 8)


@pytest.fixture
def module() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_config(make_config("llama-tiny", torch.float32)).eval()


def make_memory(device: str) -> PrefillMemory:
    return PrefillMemory(torch.device(device), ALONE, vocabulary=512)


def test_passes_are_carried_out_and_nothing_of_them_stays(
    module: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, runners = [], []

    def note(memory: PrefillMemory, prefill: Any, tokens: int, logits: int, is_plain: bool) -> torch.Tensor:
        sizes.append(tokens)
        return prefill()

    def remember(*args: Any, **named: Any) -> ModelRunner:
        runner = ModelRunner(*args, **named)
        runners.extend([weakref.ref(runner), weakref.ref(runner.cache)])
        return runner

    monkeypatch.setattr(PrefillMemory, "run", note)
    monkeypatch.setattr(kv_memory, "ModelRunner", remember)
    gc.disable()
    try:
        assert not kv_memory._carry_out(module, 600, make_memory("cpu")), "a CPU has no flash"
    finally:
        gc.enable()
    assert sizes == [512, 600]
    assert [kept() for kept in runners] == [None, None]


@pytest.mark.parametrize(
    ("by_span", "graphs", "longest", "passes", "rows"),
    [
        # Captured passes, and one beside them. Decode: 31 rows for 9 lengths; prompts: 8 and 16 for each of 15 lengths,
        # 16 short ones for 5 of them.
        (True, True, 32000, (4096, 4096), 31 * 9 + 15 * 24 + 5 * 16),
        (True, False, 32000, (4096,), 0),
        (False, False, 32000, (31999,), 0),  # a long prompt's parts read it under a mask: counted whole
        (False, True, 32000, (31999, 256), 31 * 9 + (7 + 3 * 4) * 16),
        (True, True, 100, (1792, 1792), 31 + 12 * 24 + 2 * 16),  # 16 prompts of 99 tokens are the most that can come
        (False, False, 100, (1792,), 0),
    ],
)
def test_what_is_left_for_passes(
    by_span: bool, graphs: bool, longest: int, passes: Any, rows: int, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_memory, "_carry_out", lambda *_: by_span)
    monkeypatch.setattr(kv_memory, "uses_decode_attention", lambda module: True)
    monkeypatch.setattr(PrefillMemory, "needed", lambda memory, tokens: 10 * tokens)
    config = HandlerConfig(model_path="m", max_model_len=longest, max_new_tokens=1, cuda_graphs=graphs)
    limits = read_limits(config, None, LARGE)
    found = measure_passes(module, config, limits, 4096, make_memory("cuda"))
    assert found == 10 * sum(passes) + rows * 512 * 4 + GIB // 2  # fp32 logits of 512 tokens; what libraries take
    assert measure_passes(module, config, limits, 4096, make_memory("cpu")) == 0


def test_memory_that_runs_out_at_load_is_explained() -> None:
    said = r"\(CUDA out of memory\); lower handler.kv_memory_fraction \(0.9\) or max_batch_prefill_tokens, set "
    with pytest.raises(LoadError, match=said), _memory_errors_explained(HandlerConfig(model_path="m")):
        raise torch.OutOfMemoryError("CUDA out of memory\nof two lines")
