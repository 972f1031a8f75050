"""How many pages are planned for how much memory, what a refusal suggests, and what a pass is measured to take."""

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
from dsserve.core.errors import LoadError
from dsserve.engine.build import _memory_errors_explained
from dsserve.parallel.rank import RankInfo
from dsserve.runner import kv_memory
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.kv_memory import KVPlan, measure_passes, plan_kv
from scripts.model.random import make_config

GIB = 2**30
ALONE, CPU = RankInfo(0, 0, 1, 1), torch.device("cpu")
# 2 x 80 layers x 8 KV heads x 128 values of 2 bytes: 320 KiB a token, 5 MiB a page.
LARGE = LlamaConfig(num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_size=8192)


def plan(
    free: float, passes: float = 0, ranks: int = 1, length: int = 4096, device: str = "cuda", **more: Any
) -> KVPlan:
    """The plan of the large model in bf16 with so many GiB free for each of the ranks."""
    config, rank = HandlerConfig(model_path="m", **more), RankInfo(0, 0, ranks, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 0))
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free * GIB * ranks)))
        patch.setattr(kv_memory, "agree_on_least", lambda value, rank: value)
        return plan_kv(LARGE, config, length, torch.bfloat16, rank, torch.device(device), int(passes * GIB))


def test_pages_take_their_share_of_what_passes_leave() -> None:
    """One page of all is the padding's."""
    assert plan(100) == KVPlan(KVSize(256, 4096, 18431), 90 * GIB)
    assert plan(100).tokens == 18431 * 16
    assert plan(100, passes=20).size.pages == 14745 - 1
    assert plan(100, kv_memory_fraction=0.5).size.pages == 10240 - 1
    assert plan(100, ranks=2).size.pages == 36864 - 1, "each has half of the heads"
    assert plan(100, max_running=3).size.rows == 3
    assert plan(2, length=2000).size.rows == 256, "short texts need few pages"
    assert plan(0.7, length=100).size.rows == plan(0.7, length=100).size.pages == 128


def test_a_cpu_leaves_memory_to_others_unless_one_text_needs_it() -> None:
    assert plan(100, device="cpu").size == KVSize(64, 4096, 819 - 1)
    assert plan(100, device="cpu", ranks=2).size.pages == 819 - 1, "the ranks share four GiB"
    assert plan(100, device="cpu", length=32768).size.pages == 2048
    assert plan(100, device="cpu", ranks=4, length=32768).size.pages == 2048


def test_one_text_of_the_whole_context_must_fit() -> None:
    """70 billion parameters in bf16 on two GPUs of 80 GB leave some 12 GiB each."""
    assert plan(12.3, passes=1.1, ranks=2).size.pages == 4127
    said = (
        r"a text of max_model_len 4096 tokens needs 1.25 GiB of KV cache; of 2.00 GiB free, 1.00 of them for passes "
        r"and graphs, it may take 0.89 GiB \(handler.kv_memory_fraction 0.9\): set handler.max_model_len: 2928$"
    )
    with pytest.raises(LoadError, match=said):
        plan(2, passes=1)
    assert plan(2, passes=1, length=2928).size.pages == 183
    with pytest.raises(LoadError, match="use more ranks"):
        plan(1, passes=0.999)


@settings(deadline=None)
@given(
    st.floats(0.01, 200), st.floats(0, 20), st.sampled_from(["auto", 1, 5, 64]), st.integers(2, 200_000),
    st.floats(0.1, 1), st.sampled_from([1, 2, 4]), st.sampled_from(["cuda", "cpu"]),
)  # fmt: skip
def test_a_plan_keeps_within_its_share_and_a_refusal_names_what_fits(
    free: float, passes: float, running: Any, length: int, fraction: float, ranks: int, device: str
) -> None:
    passes = passes if device == "cuda" else 0
    more = {"max_running": running, "kv_memory_fraction": fraction, "device": device}
    share = max(0.0, free - passes) * fraction * GIB
    try:
        found = plan(free, passes, ranks, length, **more)
    except LoadError as error:
        for number in re.findall(r"handler\.max_model_len: (\d+)", str(error)):
            found = plan(free, passes, ranks, int(number), **more)
            assert found.nbytes <= share + 1
        return
    assert found.nbytes <= share + 1 and found.size.pages >= found.size.row_pages
    assert found.size.rows == min(AUTO_RUNNING[device] if running == "auto" else running, found.size.pages)


@pytest.fixture
def module() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_config(make_config("llama-tiny", torch.float32)).eval()


class Memory:
    """In the place of `PrefillMemory`, on a GPU that there is none of."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = SimpleNamespace(type=device)
        self.sizes: list[int] = []

    def needed(self, tokens: int) -> int:
        return 10 * tokens

    def run(self, prefill: Any, tokens: int, logits: int, is_plain: bool) -> torch.Tensor:
        assert is_plain
        self.sizes.append(tokens)
        return prefill()


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that were made, weakly, and their caches."""
    made: list[Any] = []

    def make(module: Any, size: KVSize, rank: RankInfo, device: Any, memory: Any) -> ModelRunner:
        runner = ModelRunner(module, size, rank, CPU, memory)
        made.extend([weakref.ref(runner), weakref.ref(runner.cache)])
        return runner

    monkeypatch.setattr(kv_memory, "ModelRunner", make)
    return made


@pytest.mark.parametrize(
    ("longest", "tokens", "sizes"),
    [(32000, 600, [512, 600]), (100, 4096, [99, 99]), (601, 600, [512, 600])],
)
def test_passes_are_carried_out_and_nothing_of_them_stays(
    longest: int, tokens: int, sizes: list[int], module: LlamaForCausalLM, runners: list[Any]
) -> None:
    memory, config = Memory(), HandlerConfig(model_path="m")
    gc.disable()
    try:
        measure_passes(module, config, longest, tokens, ALONE, memory)  # type: ignore[arg-type]
    finally:
        gc.enable()
    assert memory.sizes == sizes
    assert len(runners) == 2 and all(kept() is None for kept in runners)


@pytest.mark.parametrize(
    ("packed", "graphs", "longest", "passes"),
    [
        (True, True, 32000, (8192, 4096)),  # one pass, and the captured ones of up to 4096 tokens
        (True, False, 32000, (8192,)),
        (False, True, 32000, (32000,)),  # a long prompt's parts read it under a mask: counted whole
        (False, False, 100, (8192,)),
    ],
)
def test_what_is_left_for_passes(
    packed: bool, graphs: bool, longest: int, passes: tuple[int, ...], module: Any, runners: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ModelRunner, "is_packed", packed)
    monkeypatch.setattr(kv_memory, "PREFILL_BUCKETS", (16,))
    monkeypatch.setattr(ModelRunner, "trial", lambda runner: SimpleNamespace(step=lambda *_: None))
    config = HandlerConfig(model_path="m", cuda_graphs=graphs)
    found = measure_passes(module, config, longest, 8192, ALONE, Memory())  # type: ignore[arg-type]
    # A number for each of 512 words of 256 rows: twice in fp32, and what choosing takes; and what libraries take.
    assert found == 10 * sum(passes) + 256 * 512 * (2 * 4 + 28) + GIB // 2
    assert measure_passes(module, config, longest, 8192, ALONE, Memory("cpu")) == 0  # type: ignore[arg-type]


def test_memory_that_runs_out_at_load_is_explained() -> None:
    said = r"\(CUDA out of memory\); lower handler.kv_memory_fraction \(0.9\) or max_num_batched_tokens, set "
    with pytest.raises(LoadError, match=said), _memory_errors_explained(HandlerConfig(model_path="m")):
        raise torch.OutOfMemoryError("CUDA out of memory\nof two lines")
