"""The Triton matmuls of a few rows against fp64, on shapes that no block divides, and in a chain in a graph."""

from __future__ import annotations

import pytest
import torch

from dsserve.kernels import gpu_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
# ||out - ref|| / ||ref||: the result's rounding.
LIMIT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _ops() -> None:
    assert gpu_ops.load_gpu_ops()


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 32, 33])
@pytest.mark.parametrize(("outputs", "size"), [(4096, 4096), (1000, 2731), (33, 70), (1, 1024), (6144, 5504)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_as_in_fp64(rows: int, outputs: int, size: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, rows, size, dtype=dtype, device="cuda")
    weight = torch.randn(outputs, size, dtype=dtype, device="cuda")
    bias = torch.randn(outputs, dtype=dtype, device="cuda") if has_bias else None
    memory = torch.full((rows, outputs), float("nan"), dtype=dtype, device="cuda")
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    for out in (None, memory):
        found = gpu_ops.multiply(x, weight, bias, out)
        assert found.shape == (1, rows, outputs)
        assert (found.double() - expected).norm() <= LIMIT[dtype] * expected.norm()
    assert torch.equal(memory[None], found)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [1, 7, 33, 64, 65])
@pytest.mark.parametrize(("outputs", "size"), [(4096, 4096), (1000, 2736), (33, 80)])
def test_weights_of_8_bits_as_in_fp64(
    rows: int, outputs: int, size: int, kind: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, size, dtype=dtype, device="cuda")
    weight = (40 * torch.randn(outputs, size, device="cuda")).clamp(-127, 127).to(kind)
    scale = torch.rand(outputs, device="cuda") / 40
    bias = torch.randn(outputs, dtype=dtype, device="cuda")
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    found = gpu_ops.multiply(x, weight, bias, None, scale)  # of 65 rows the expanded weight is rounded, too
    assert (found.double() - expected).norm() <= 2 * LIMIT[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 17, 32, 33])
@pytest.mark.parametrize(("half", "size"), [(5504, 4096), (333, 2736), (1, 80)])
def test_a_gate_and_its_product_as_in_fp64(
    rows: int, half: int, size: int, is_scaled: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, rows, size, dtype=dtype, device="cuda")
    weight = (2 * torch.randn(2 * half, size, device="cuda") / size**0.5).to(dtype)
    scale = None
    if is_scaled:
        weight, scale = (30 * torch.randn_like(weight)).to(torch.int8), torch.rand(2 * half, device="cuda") / 900
    whole = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    gate, up = (x.double() @ whole.t()).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    found = gpu_ops.multiply_gated(x, weight, scale)
    if rows > 32 or (rows > 1 and dtype == torch.float32):
        assert found is None
    else:
        assert found is not None and found.shape == (1, rows, half)
        assert (found.double() - expected).norm() <= 2 * LIMIT[dtype] * expected.norm()


@pytest.mark.parametrize("rows", [1, 8])
def test_a_chain_of_them_waits_for_each_other(rows: int) -> None:
    """Kernels that begin before their input is there would read the last replay's."""
    torch.manual_seed(0)
    weights = [torch.randn(2048, 2048, dtype=torch.float16, device="cuda") / 2048**0.5 for _ in range(6)]
    x, ones = torch.zeros(2, rows, 2048, dtype=torch.float16, device="cuda")
    ones.fill_(1)

    def run() -> torch.Tensor:
        y = x
        for weight in weights:
            y = gpu_ops.multiply(gpu_ops.gated_silu(y, ones), weight, None)
        return y

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in range(20):
        x.copy_(3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        replayed = found.clone()
        y = x.double()
        for weight in weights:
            y = torch.nn.functional.silu(y) @ weight.double().t()
        assert (replayed.double() - y).norm() <= 2e-2 * y.norm()
