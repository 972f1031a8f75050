"""A sampling parameter is one row of a table: nothing else knows of it, and both samplers obey the row."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dsserve.core.request import SamplingParams
from dsserve.sampling.filters import find_candidates
from dsserve.sampling.gpu_sampler import DeviceSampler
from dsserve.sampling.penalties import EDITS, RowEdits, edit_logits
from dsserve.sampling.pending import HostChoice
from dsserve.sampling.rules import CLOSE, RULES, Likeliest, Rule, are_close
from tests.conftest import ROOT
from tests.support.sampling import assert_same, make_logits

PACKAGE = ROOT / "handlers" / "dsserve"
SHARED = {"protocol/fields.py", "core/request.py"}
MOST_FILES = 3


def names_in(path: Path) -> set[str]:
    """Attributes, keywords, variables and whole strings of a module; not its prose."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        named = (ast.Attribute, "attr"), (ast.Name, "id"), (ast.keyword, "arg"), (ast.Constant, "value")
        found |= {str(getattr(node, field)) for kind, field in named if isinstance(node, kind)}
    return found


NAMES_OF = {str(path.relative_to(PACKAGE)): names_in(path) for path in sorted(PACKAGE.rglob("*.py"))}


def test_a_parameter_stands_in_three_files_at_most() -> None:
    places = {rule.name: "sampling/rules.py" for rule in RULES}
    places |= {name: "sampling/penalties.py" for edit in EDITS for name in edit.names}
    places.pop("min_tokens")  # ends texts, too
    for parameter, table in places.items():
        files = {name for name, names in NAMES_OF.items() if parameter in names}
        assert files == {*SHARED, table} and len(files) <= MOST_FILES, parameter


def test_every_parameter_is_in_a_table_or_is_no_change_of_the_logits() -> None:
    rows = {rule.name for rule in RULES} | {name for edit in EDITS for name in edit.names}
    others = {"temperature", "seed", "logprobs", "grammar"}
    assert not rows & others and rows | others == set(SamplingParams.__dataclass_fields__)


@dataclass(frozen=True)
class WithDepth(SamplingParams):
    """With a parameter that nobody has: tokens whose logit is at most so much below the largest."""

    depth: float | None = None


def _depth(rows: Likeliest, limit: np.ndarray) -> None:
    rows.narrow(rows.weights >= np.exp(-limit))


def _depth_on_device(rows: Likeliest, limit: torch.Tensor) -> None:
    rows.narrow(rows.weights >= (-limit).exp())
    rows.close.append(are_close(rows.weights, (-limit).exp(), CLOSE))


def test_a_row_is_all_that_a_new_rule_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (*RULES, Rule("depth", np.inf, lambda wish: max(wish, 0.0), _depth, _depth_on_device))
    for module in ("rules", "filters", "gpu_draw"):
        monkeypatch.setattr(f"dsserve.sampling.{module}.RULES", rules)
    monkeypatch.setattr("dsserve.sampling.gpu_sampler.ROW_NUMBERS", 2 + len(rules))
    logits = make_logits(3, 40, 5000, 4.0, torch.float32, "plain")
    params: list[SamplingParams] = [WithDepth(1.0, seed=seed, depth=2.0) for seed in range(40)]
    for row, found in enumerate(find_candidates(logits, params)):
        assert found.ids.tolist() == torch.nonzero(logits[row] >= logits[row].max() - 2)[:, 0].tolist()
    mixed = [*params[:20], *(WithDepth(1.0, seed=seed, top_p=0.9, depth=1.0) for seed in range(10)), *params[30:]]
    assert_same([HostChoice, DeviceSampler(40, 5000, torch.device("cpu")).launch], logits, mixed, steps=2)


def test_a_rule_that_is_off_keeps_everything() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0, 1.0]])
    values = logits.sort(descending=True).values
    for rule in RULES:
        rows = Likeliest(
            values.double().numpy(),
            (values - values[:, :1]).double().exp().numpy(),
            True,
            lambda: np.ones((1, 1)),
            np.ones((1, 4), bool),
            np.zeros((1, 1), bool),
        )
        rule.host(rows, np.array([[rule.off]]))
        assert rows.keep.all() and not rows.lost.any() and rule.limit(SamplingParams()) == rule.off, rule.name


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_edit_of_some_steps_ends_and_the_row_is_plain_again(steps: int) -> None:
    edits = RowEdits(SamplingParams(min_tokens=steps), (1,), frozenset({2}))
    for step in range(5):
        logits = torch.zeros(1, 4)
        edit_logits(logits, [edits])
        assert edits.is_plain is (step >= steps) is bool(logits[0, 2] == 0)
        edits.add(3)


def test_tokens_are_counted_for_edits_that_are_on_alone() -> None:
    edits = RowEdits(SamplingParams(logit_bias={1: 1.0}), (1, 2), frozenset())
    edits.add(3)
    assert edits._history._counts == []
