"""The compiled operations against the torch code that they replace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dsserve.kernels.cpu_ops import is_loaded, load_cpu_ops
from dsserve.kv.store import PagedLayer, Window
from dsserve.modeling.fused_ops import FusedRMSNorm, FusedRotary, use_fused_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_compiler = pytest.mark.skipif(not load_cpu_ops(), reason="g++ or ninja is missing: the operations are not used")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    places = 8 * torch.finfo(expected.dtype).eps  # a norm's sum may be taken in another order
    torch.testing.assert_close(found, expected, rtol=places, atol=places)


class Layer(nn.Module):
    """Something with norms, in a modelling file of its own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(8, 8)


@needs_compiler
@each_dtype
def test_the_norm_is_llamas(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 576), (3, 7, 100), (5, 33)):
        norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
        norm.weight.data = random(shape[-1], dtype=dtype)
        layer = Layer(norm).to(dtype)
        assert use_fused_ops(layer, torch.ops.dsserve_cpu) == 1 and isinstance(layer.norm, FusedRMSNorm)
        x = random(*shape, dtype=dtype)
        assert_close(layer.norm(x), norm(x))


@needs_compiler
def test_a_norm_that_computes_something_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_gemma, "apply_rotary_pos_emb")  # which is the same, and not what this is about
    layer = Layer(modeling_gemma.GemmaRMSNorm(16))
    assert use_fused_ops(layer, torch.ops.dsserve_cpu) == 0 and isinstance(layer.norm, modeling_gemma.GemmaRMSNorm)


def llamas_rotary() -> Callable[..., Any]:
    """transformers' own, also where another test has served a model in this process."""
    found = modeling_llama.apply_rotary_pos_emb
    return found.original if isinstance(found, FusedRotary) else found


@needs_compiler
@each_dtype
def test_the_rotary_embedding_is_llamas(dtype: torch.dtype) -> None:
    fused = random(3, 5, 640, dtype=dtype)  # q, k, v side by side, as a fused matmul gives them
    q = fused[..., :384].view(3, 5, 6, 64).transpose(1, 2)
    k = fused[..., 384:512].view(3, 5, 2, 64).transpose(1, 2)
    for rows in (1, 3):
        cos, sin = random(rows, 5, 64, dtype=dtype), random(rows, 5, 64, dtype=dtype) * 0.5
        expected = llamas_rotary()(q, k, cos, sin)
        for found, reference in zip(torch.ops.dsserve_cpu.rotary(q, k, cos, sin), expected, strict=True):
            assert torch.equal(found, reference)


@needs_compiler
def test_the_rotary_function_of_a_modelling_file_is_replaced_where_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def install(function: object) -> ModuleType:
        modelling = ModuleType("modelling_of_the_test")
        modelling.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, modelling.__name__, modelling)
        return modelling

    class Attention(nn.Module):
        __module__ = "modelling_of_the_test"

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    original = llamas_rotary()
    modelling = install(original)
    assert use_fused_ops(Attention(), torch.ops.dsserve_cpu) == 1
    replaced = modelling.apply_rotary_pos_emb
    assert replaced is not original
    q, cos = random(1, 2, 4, 16), random(1, 4, 16)
    assert_close(replaced(q, q, cos, cos)[0], original(q, q, cos, cos)[0])
    turned = q.transpose(1, 2)
    assert torch.equal(replaced(turned, turned, cos, cos, 2)[0], original(turned, turned, cos, cos, 2)[0])
    elsewhere = q.to("meta"), q.to("meta"), cos.to("meta"), cos.to("meta")
    assert replaced(*elsewhere)[0].is_meta
    assert use_fused_ops(Attention(), torch.ops.dsserve_cpu) == 1
    assert modelling.apply_rotary_pos_emb.original is original

    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        return q * cos[:, None], k * cos[:, None]

    modelling = install(interleaved)
    assert use_fused_ops(Attention(), torch.ops.dsserve_cpu) == 0 and modelling.apply_rotary_pos_emb is interleaved


@needs_compiler
@each_dtype
@pytest.mark.parametrize("prefill", [True, False])
def test_tokens_reach_the_cells_that_torch_would_write(
    dtype: torch.dtype, prefill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = (random(2, 9, 3, 8, dtype=dtype).transpose(1, 2) for _ in range(2))  # [B, heads, T, D]
    if prefill:
        keys, values, cells = keys[:1], values[:1], torch.tensor([20, 21, 22, 40, 41])  # the last 4 tokens are padding
    else:
        keys, values, cells = keys[:, :, :1], values[:, :, :1], torch.tensor([7, 40])
    written = []
    for loaded in (True, False):
        monkeypatch.setattr("dsserve.kernels.cpu_ops.is_loaded", lambda loaded=loaded: loaded)
        layer = PagedLayer(60, Window(cells))
        layer.update(keys, values)
        written.append(layer)
    assert torch.equal(written[0].keys, written[1].keys) and torch.equal(written[0].values, written[1].values)
    assert written[0].keys.abs().sum((1, 2)).nonzero().flatten().tolist() == cells.tolist()


@needs_compiler
def test_a_cell_outside_the_slots_is_an_error_and_no_write() -> None:
    slots, x = torch.zeros(2, 4, 1, 8), random(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match="no such cell"):
        torch.ops.dsserve_cpu.store(slots, slots, x, x, torch.tensor([8]))


def test_without_a_compiler_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    load = load_cpu_ops.__wrapped__
    assert load() is False


@needs_compiler
def test_they_are_loaded() -> None:
    assert is_loaded()


@needs_compiler
@each_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(4, 4, 64, 64), (6, 2, 20, 20), (5, 1, 33, 17), (9, 3, 7, 12)]
)
def test_attention_over_pages_is_torchs(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, value_dim: int
) -> None:
    page, pages, texts = 5, 40, [1, 5, 6, 31, 100, 17]
    keys = (random(pages * page, kv_heads, dim) / 3).to(dtype)
    values = random(pages * page, kv_heads, value_dim, dtype=dtype)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.zeros(8, 20, dtype=torch.int32)
    rows = torch.tensor([3, 0, 7, 1, 2, 5])
    for row, length in zip(rows, texts, strict=True):
        count = -(-length // page)
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    fused = (random(heads, len(texts), dim) / 3).to(dtype)  # heads first, as models have them
    query = fused.transpose(0, 1)
    found = torch.ops.dsserve_cpu.paged_attention(
        query, keys, values, table, rows, torch.tensor(texts), page, dim**-0.5
    )
    assert found.shape == (len(texts), heads, value_dim) and found.dtype == dtype
    for number, length in enumerate(texts):
        at = torch.arange(length)
        cells = table[rows[number]].long()[at // page] * page + at % page
        own = (tensor[cells].transpose(0, 1)[None].double() for tensor in (keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[number][None, :, None].double(), *own, enable_gqa=True
        )[0, :, 0]
        assert_close(found[number], expected.to(dtype))


@needs_compiler
def test_attention_over_pages_refuses_what_is_not_there() -> None:
    query, stored, table = torch.zeros(1, 2, 4), torch.zeros(8, 2, 4), torch.zeros(1, 2, dtype=torch.int32)
    attend = torch.ops.dsserve_cpu.paged_attention
    for row, length in ((1, 1), (-1, 1), (0, 0), (0, 9)):
        with pytest.raises(RuntimeError):
            attend(query, stored, stored, table, torch.tensor([row]), torch.tensor([length]), 4, 1.0)
    with pytest.raises(RuntimeError):
        attend(query, stored[:, :, :3].contiguous(), stored, table, torch.tensor([0]), torch.tensor([1]), 4, 1.0)
