"""The Triton kernel against torch's attention in fp32, on ragged rows of a larger cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsserve.attention.decode import decode_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
LIMIT = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "length"),
    [
        (1, 32, 32, 128, 300), (3, 8, 2, 80, 333), (2, 9, 3, 64, 512), (64, 4, 1, 64, 17),
        (5, 6, 6, 256, 100), (2, 16, 1, 96, 4096),
    ],
)  # fmt: skip
def test_as_torch(rows: int, heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, rows + 2, length + 70, kv_heads, dim, dtype=dtype, device="cuda")
    key, value = (stored[:rows, :length].transpose(1, 2) for stored in (keys, values))
    query = torch.randn(rows, 1, heads, dim, dtype=dtype, device="cuda").transpose(1, 2)
    ends = torch.randint(1, length + 1, (rows, 1), device="cuda")
    hidden = torch.arange(length, device="cuda") >= ends
    mask = torch.zeros(rows, length, dtype=dtype, device="cuda").masked_fill_(hidden, float("-inf"))[:, None, None]
    found = decode_attention(query, key, value, mask, dim**-0.5).double()
    key, value = (part.double().repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    expected = F.scaled_dot_product_attention(query.double(), key, value, attn_mask=mask.double())
    assert (found - expected).norm() / expected.norm() < LIMIT[dtype]
