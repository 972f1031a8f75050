"""What is captured, and what a captured step computes, with capture replaced by running again: a CPU shows the padding,
a GPU the rest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dsserve.core.step_plan import Wanted
from dsserve.kernels.cuda_graph import buckets
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.step_graphs import MOST_TOKENS, row_counts, token_counts
from scripts.model.random import draw_prompts, make_config
from tests.support.torch_pages import Graph, fake_capture, use_graphs

CPU, ROWS, CONTEXT = torch.device("cpu"), 4, 600


@given(first=st.integers(1, 300), more=st.integers(0, 100_000))
def test_every_size_has_a_bucket_that_wastes_at_most_half(first: int, more: int) -> None:
    last = first + more
    sizes = buckets(first, last)
    assert sizes[0] == first and sizes[-1] == last and sizes == sorted(set(sizes))
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))


@given(st.integers(1, 1024))
def test_every_number_of_texts_has_a_graph_that_wastes_little(rows: int) -> None:
    counts = row_counts(rows)
    assert counts[0] == 1 and counts[-1] == rows and counts == sorted(set(counts)) and len(counts) < 40
    assert all(after <= 2 * before for before, after in itertools.pairwise(counts))
    assert all(after - before <= 32 for before, after in itertools.pairwise(counts) if before < 256)


def test_examples() -> None:
    assert row_counts(1) == [1] and row_counts(16) == [1, 2, 4, 6, 8, 16]
    assert token_counts(0) == [] and token_counts(100) == [16, 32, 64, 96]
    assert token_counts(8192)[-1] == MOST_TOKENS == 4096


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> tuple[ModelRunner, ModelRunner]:
    """One that runs eagerly, one in graphs, with the same weights."""
    fake_capture(monkeypatch)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama-tiny", torch.float32)).eval()
    for weight in (weight for weight in model.parameters() if weight.dim() > 1):
        torch.nn.init.normal_(weight, std=0.2)
    size = KVSize.of_rows(ROWS, CONTEXT)
    eager, captured = (ModelRunner(model, size, RankInfo(0, 0, 1, 1), CPU) for _ in range(2))
    use_graphs(captured, 256)
    Graph.replays = 0
    return eager, captured


def test_captured_steps_have_the_logits_of_an_eager_pass(runners: tuple[ModelRunner, ModelRunner]) -> None:
    first, long, other = (draw_prompts(512, length, 1)[0] for length in (37, 590, 90))
    steps = [
        ((0, first), (1, other[:20])),
        ((0, (1,)), (1, other[20:])),
        ((0, (2,)), (1, (3,)), (2, long[:200])),
        ((0, (4,)), (1, (5,)), (2, long[200:440]), (3, (9,))),
        ((3, (7,)),),
        ((1, (5,)), (3, (8,)), (0, (9,)), (2, long[440:])),
        ((3, (1,)), (1, (2,)), (2, (3,)), (0, (4,))),
    ]
    trials = [runner.trial() for runner in runners]
    for number, step in enumerate(steps):
        expected, found = (trial.step(*step) for trial in trials)
        assert expected.next.abs().max() > 1
        assert (expected.next - found.next).abs().max() < 1e-4, number
    assert Graph.replays == len(steps)


def test_logits_of_a_step_outlive_the_next_one(runners: tuple[ModelRunner, ModelRunner]) -> None:
    trial = runners[1].trial()
    first = trial.step((0, (1, 2, 3)), (1, (4, 5)))
    kept = first.next.clone()
    trial.step((0, (7,)), (1, (8,)))
    assert torch.equal(first.next, kept)


def test_what_the_device_chose_and_what_nobody_reads(runners: tuple[ModelRunner, ModelRunner]) -> None:
    found = []
    for runner in runners:
        trial = runner.trial()
        trial.step((0, (1, 2, 3)), (1, (4, 5)))
        chosen = torch.tensor([6, 7])
        mixed = trial.step((1, (0,)), (0, (0,)), (2, (8, 9)), sources=(1, 0, -1), chosen=chosen).next
        nothing = trial.step((2, (3, 4, 5)), wanted=Wanted.NOTHING).next
        assert nothing.shape == (0, 512)
        found += [mixed, trial.step((0, (0,)), (1, (0,)), sources=(0, 1), chosen=chosen).next]
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-4)


def test_steps_that_were_not_captured_run_eagerly(runners: tuple[ModelRunner, ModelRunner]) -> None:
    prompt = draw_prompts(512, 400, 1)[0]
    trials = [runner.trial() for runner in runners]
    for part, wanted in (((0, prompt), Wanted.NEXT), ((1, prompt[:30]), Wanted.NEXT | Wanted.ALL)):
        expected, found = (trial.step(part, wanted=wanted) for trial in trials)
        torch.testing.assert_close(found.next, expected.next, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.prompts, expected.prompts, rtol=1e-4, atol=1e-4)
    assert Graph.replays == 0
