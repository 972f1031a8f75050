"""What a prefill graph computes, with capture replaced by running again: a CPU shows the padding, a GPU the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dsserve.attention.prefill import PROMPT_SPANS
from dsserve.core.step_plan import Admission, Plan
from dsserve.kv.cache import SlotLayer
from dsserve.runner import prefill_graphs
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.prefill_graphs import PrefillGraphs, Shape, most_captured
from scripts.model.random import draw_prompts, make_config
from tests.unit.attention.test_prefill import in_spans

CPU, SLOTS, CONTEXT = torch.device("cpu"), 4, 600


class Again:
    """In a CUDA graph's place: runs the same function on the same tensors."""

    replays = 0

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run
        self.out = run()

    def replay(self) -> None:
        Again.replays += 1
        self.out.copy_(self._run())


def attend_in_spans(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Attention that takes spans where there are some, and a mask else."""
    spans = kwargs.pop(PROMPT_SPANS, None)
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    assert mask is None
    return in_spans(query, key, value, kwargs.get("scaling"), spans), None


def write(layer: SlotLayer, stored: torch.Tensor, new: torch.Tensor) -> None:
    """As the GPU's store: nothing is written to negative cells."""
    cells, tokens = layer._window.cells, new.transpose(1, 2).flatten(0, 1)
    real = cells >= 0
    stored.flatten(0, 1)[cells[real]] = tokens[: len(cells)][real]


@pytest.fixture(params=["mask", "spans"])
def runners(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelRunner, ModelRunner]:
    """One that prefills eagerly under masks, one in graphs, with the same weights."""

    def capture(run: Callable[[], torch.Tensor], pool: object, device: torch.device) -> Any:
        graph = Again(run)
        return graph, graph.out

    monkeypatch.setattr(prefill_graphs, "capture", capture)
    monkeypatch.setattr(SlotLayer, "_write", write)
    # A CPU's own operation, if another test has loaded it, takes no negative cells.
    monkeypatch.setattr("dsserve.kv.cache.loaded_ops", lambda device: None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama-tiny", torch.float32)).eval()
    for weight in (weight for weight in model.parameters() if weight.dim() > 1):
        torch.nn.init.normal_(weight, std=0.2)
    eager, captured = (ModelRunner(model, SLOTS, CONTEXT, CPU) for _ in range(2))
    for runner in (eager, captured):  # makes the cache's tensors
        runner.execute(Plan(admit=(Admission((0,)),)))
        runner.execute(Plan(evict=(0,)))
    by_prompt = request.param == "spans"
    if by_prompt:
        AttentionInterface.register("in_spans", attend_in_spans)
        captured.forward._module = copy.deepcopy(model)
        captured.forward._module.config._attn_implementation = "in_spans"
    graphs = PrefillGraphs(captured.forward.prefill, SLOTS, CONTEXT - 1, CPU, by_prompt)
    graphs.capture(None)
    captured._prefill_graphs = graphs
    Again.replays = 0
    return eager, captured


def test_prompts_parts_and_taken_over_beginnings_have_the_logits_of_an_eager_pass(
    runners: tuple[ModelRunner, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, long, other = (draw_prompts(512, length, 1)[0] for length in (37, 590, 90))
    plans = [
        Plan(admit=(Admission(first), Admission(other[:20]))),
        Plan(admit=(Admission(first[:30] + other[:9]),)),
        Plan(tokens=(1, 2, 3), admit=(Admission((*other[20:], 7), source=1, shared=20),)),
        Plan(evict=(3, 1), tokens=(4, 5), admit=(Admission(long[:256], complete=False),)),
        Plan(tokens=(6, 7), admit=(Admission(long[256:500], shared=256, continues=True, complete=False),)),
        Plan(evict=(0,), tokens=(8,), admit=(Admission(long[500:], shared=500, continues=True), Admission(first))),
        Plan(tokens=(9, 10, 11)),
    ]  # fmt: skip
    eager, captured = runners
    decoded: list[Plan] = []  # in a pass of their own
    original = captured._decode
    monkeypatch.setattr(captured, "_decode", lambda plan, chosen: decoded.append(plan) or original(plan, chosen))
    for number, plan in enumerate(plans):
        expected, found = (runner.execute(plan) for runner in runners)
        assert expected is not None and found is not None
        assert expected.next.abs().max() > 1
        assert (expected.next - found.next).abs().max() < 1e-4, number
    assert Again.replays == 6
    by_prompt = captured._prefill_graphs is not None and captured._prefill_graphs.by_prompt
    assert decoded == [plan for plan in plans if plan.tokens and not (plan.admit and by_prompt)]
    assert eager._lengths == captured._lengths == [44, 591, 38]


def shapes(most: int, longest: int, by_prompt: bool) -> list[Shape]:
    return PrefillGraphs(None, most, longest, CPU, by_prompt).shapes  # type: ignore[arg-type]


def test_a_pass_may_be_longer_than_any_prompt() -> None:
    def lengths(most: int, longest: int, by_prompt: bool) -> list[int]:
        return sorted({shape.tokens for shape in shapes(most, longest, by_prompt)})

    assert lengths(2, 100, False) == [16, 32, 64, 96, 128, 192, 256]
    assert lengths(1, 100, False) == [16, 32, 64, 96, 128]
    assert lengths(64, 255, True)[-3:] == [2048, 3072, 4096]
    assert 768 in lengths(64, 255, True) and 768 not in lengths(64, 255, False)


def test_no_pass_is_captured_that_the_scheduler_does_not_make() -> None:
    """Up to the step's prompts and a decoded row for each slot."""
    captured = PrefillGraphs(None, 16, 4095, CPU, by_prompt=True, tokens=256).shapes  # type: ignore[arg-type]
    assert max(shape.tokens for shape in captured) == most_captured(16, 4095, True, 256) == 384
    assert most_captured(64, 4095, True, 4096) == 4096 and most_captured(64, 4095, False, 4096) == 256


def test_with_spans_few_long_and_many_short_prompts_have_their_own_graphs() -> None:
    def of(most: int, tokens: int) -> list[Shape]:
        return [shape for shape in shapes(most, 4095, True) if shape.tokens == tokens]

    assert of(64, 128) == [Shape(128, 8, 128), Shape(128, 64, 128)]
    assert of(64, 2048) == [Shape(2048, 8, 2048), Shape(2048, 64, 256), Shape(2048, 64, 2048)]
    assert of(64, 16) == [Shape(16, 8, 16), Shape(16, 16, 16)] and of(4, 1024) == [Shape(1024, 4, 1024)]


def test_what_graphs_read_is_bounded() -> None:
    def reads(longest: int) -> list[int]:
        return sorted({shape.read for shape in shapes(4, longest, False)})

    assert reads(40) == [0, 512] and reads(599) == [0, 512, 768]
    assert reads(4000) == reads(131071) == [0, 512, 1024, 2048, 4096]


@given(*(st.tuples(*[st.integers(0, 9)] * 4) for _ in range(2)))
def test_a_graph_holds_what_is_no_larger_in_anything(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    no_larger = all(less <= more for less, more in zip(other, one, strict=True))
    assert Shape(*one).holds(Shape(*other)) == (no_larger and bool(one[3]) == bool(other[3]))


def test_passes_that_were_not_captured_run_eagerly(runners: tuple[ModelRunner, ModelRunner]) -> None:
    prompt = draw_prompts(512, 400, 1)[0]
    plans = [
        Plan(admit=(Admission(prompt),)),
        Plan(admit=(Admission(prompt[:30], all_logits=True),)),
        Plan(admit=(Admission(prompt[300:] * 3, source=0, shared=300),)),
    ]
    for plan in plans:
        expected, found = (runner.execute(plan) for runner in runners)
        assert expected is not None and found is not None
        assert (expected.next - found.next).abs().max() < 1e-4
    # With spans only logits of all tokens are wanted in vain; under a mask all passes are too long.
    assert Again.replays == (2 if runners[1]._prefill_graphs.by_prompt else 0)  # type: ignore[union-attr]
