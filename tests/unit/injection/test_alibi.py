"""BLOOM's position biases: in fp32 they are exact where half precision's are not."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from dsserve.injection.alibi import AlibiSoftmax

ROWS, HEADS, LENGTH, SCALE = 2, 16, 600, 0.125
HALVES = [torch.float16, torch.bfloat16]


def exact(scores: torch.Tensor, visible: torch.Tensor, heads: slice, dtype: torch.dtype) -> torch.Tensor:
    """Probabilities in fp64 of biases that were rounded to `dtype`; visible `[B, 1, S, L]`."""
    biases = build_alibi_tensor(visible[:, 0, -1].long(), HEADS, torch.float32).to(dtype).double()
    biases = biases.view(ROWS, HEADS, 1, -1)[:, heads]
    return (scores.double() * SCALE + biases).masked_fill(~visible, float("-inf")).softmax(-1)


def masks(new: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is visible, causally and beside a row's padding, and the kernels' form of the padding alone."""
    shown = torch.ones(ROWS, 1, 1, LENGTH, dtype=torch.bool)
    shown[1, ..., :padding] = False
    causal = torch.ones(new, LENGTH, dtype=torch.bool).tril(LENGTH - new)
    return shown & causal, (~shown).half() * -10000


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("new", [LENGTH, 1])
def test_probabilities_are_those_of_exact_biases(dtype: torch.dtype, new: int) -> None:
    torch.manual_seed(0)
    scores = (8 * torch.randn(ROWS, HEADS, new, LENGTH)).to(dtype)
    visible, mask = masks(new, padding=37)
    wanted = exact(scores, visible, slice(None), torch.float32)
    rounded = exact(scores, visible, slice(None), dtype)
    softmax = AlibiSoftmax(HEADS, torch.device("cpu"))
    found = softmax(scores.clone(), mask.to(dtype), new > 1, SCALE, 0, alibi=None, recompute=False)
    seen = visible.any(-1, keepdim=True).expand_as(wanted)  # a padding token sees nothing
    assert (found - wanted)[seen].abs().max() < torch.finfo(dtype).eps
    assert (rounded - wanted)[seen].abs().max() > 10 * torch.finfo(dtype).eps


def test_a_rank_has_the_biases_of_its_own_heads() -> None:
    scores = torch.randn(ROWS, HEADS // 2, LENGTH, LENGTH)
    visible, _ = masks(LENGTH, padding=0)
    found = AlibiSoftmax(HEADS, torch.device("cpu"))(scores.clone(), torch.empty(1), True, SCALE, HEADS // 2)
    assert torch.allclose(found.double(), exact(scores, visible, slice(HEADS // 2, None), torch.float32), atol=1e-6)
