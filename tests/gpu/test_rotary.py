"""The Triton rotary embedding against transformers', bit for bit up to a rounding, for few and for many tokens."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dsserve.kernels import gpu_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 32, 128), (9, 3, 64), (12, 1, 80)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (5, 1), (1, 32), (1, 33), (3, 50), (40, 1)])
def test_as_transformers(batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    assert gpu_ops.load_gpu_ops()
    torch.manual_seed(0)
    both = torch.randn(batch, tokens, heads + kv_heads, dim, dtype=dtype, device="cuda").transpose(1, 2)
    q, k = both.split([heads, kv_heads], dim=1)  # as a fused matmul gives them
    cos, sin = torch.randn(2, batch, tokens, dim, dtype=dtype, device="cuda")
    for found, expected in zip(gpu_ops.rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        places = 2 * torch.finfo(dtype).eps
        assert torch.allclose(found, expected, rtol=places, atol=places)
