"""Quantized layers: rounding as small as the bits allow and no smaller, what stays as it is, and every refusal."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from dsserve.core.errors import LoadError
from dsserve.modeling.quantization import QuantizedLinear, check_device, quantize_engine, quantize_layers
from dsserve.modeling.self_check import SelfCheck
from dsserve.parallel.rank import RankInfo

CPU = torch.device("cpu")
BF16 = torch.bfloat16
# Relative error of a product with Gaussian weights: int8 rounds to 1/127 of a row's largest value, int4 to 1/15 of the
# range of 32. Below the first figure nothing was quantized, above the second the scales are wrong.
MODES = [("int8", BF16), ("int8", torch.float32), ("int4", BF16), ("int4", torch.float16), ("int4", torch.float32)]
ERRORS = {"int8": (4e-3, 1.5e-2), "int4": (5e-2, 1.2e-1)}


def small_llama(dtype: torch.dtype = BF16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_a_product_differs_by_the_rounding_alone(mode: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(96, 128).to(dtype), torch.randn(96).to(dtype)
    x = torch.randn(1, rows, 128).to(dtype)
    layer = QuantizedLinear(weight, bias, row_parallel=False, mode=mode)
    with torch.inference_mode():
        found = layer(x).float() - bias.float()
    exact = x.float() @ weight.float().T
    error = ((found - exact).norm() / exact.norm()).item()
    assert found.shape == (1, rows, 96)
    assert ERRORS[mode][0] < error < ERRORS[mode][1]
    assert layer.bytes < layer.bytes_before * (0.55 if mode == "int8" else 0.45)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_whole_weights_of_127_levels_are_exact(dtype: torch.dtype) -> None:
    """Scales of their own for each row: rows that hold -127 to 127 steps lose nothing."""
    steps = torch.arange(-127, 128, 2).repeat(4, 1)[:, :128]
    weight = (steps * torch.tensor([[1.0], [2.0], [0.25], [64.0]])).to(dtype)
    layer = QuantizedLinear(weight, None, row_parallel=False, mode="int8")
    with torch.inference_mode():
        found = layer(torch.eye(128, dtype=dtype)[:16])
    assert torch.allclose(found.float(), weight.float().T[:16], rtol=1e-2)


@pytest.mark.parametrize("columns", [7, 8, 24, 33, 40, 72, 120, 240, 272])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_int8_holds_every_shape(rows: int, columns: int) -> None:
    """torch's direct product reads past the end of rows that its step does not divide."""
    torch.manual_seed(2)
    weight = torch.randn(rows, columns).to(BF16)
    layer = QuantizedLinear(weight, None, False, "int8")
    x = torch.randn(3, columns).to(BF16)
    exact = x.float() @ weight.float().T
    with torch.inference_mode():
        assert (layer(x).float() - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("shape", [(96, 40), (99, 64)])  # groups of 32 columns, rows by 16
def test_int4_refuses_a_shard_that_its_groups_do_not_divide(shape: tuple[int, int]) -> None:
    with pytest.raises(LoadError) as raised:
        QuantizedLinear(torch.randn(*shape, dtype=BF16), None, False, "int4")
    assert all(word in str(raised.value) for word in [str(list(shape)), "int8", "nproc-per-node"])


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_an_empty_shard_gives_nothing(mode: str) -> None:
    assert QuantizedLinear(torch.empty(0, 40, dtype=BF16), None, False, mode)(torch.randn(3, 40).to(BF16)).numel() == 0


def test_head_and_embeddings_stay_and_siblings_are_one_matmul() -> None:
    model = small_llama()
    embeddings = model.get_input_embeddings().weight.clone()
    layers = quantize_layers(model, "int8")
    assert len(layers) == 2 * 4  # q/k/v, o, gate/up, down
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not [name for name, _ in model.named_parameters() if "proj" in name]  # the old weights are gone


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_engine_is_held_to_the_quantized_logits(mode: str) -> None:
    model = small_llama()
    check = SelfCheck.capture(model, BF16)
    new = quantize_engine(model, mode, check, RankInfo(0, 0, 1, 1), CPU)
    assert new is not None
    assert check.error(new.logits) > 1e-3  # it is quantized
    with torch.inference_mode():
        assert new.error(model(check.token_ids[None]).logits[0]) < 1e-2


def test_logits_that_rounding_does_not_explain_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsserve.modeling import quantization

    model = small_llama()
    check = SelfCheck.capture(model, BF16)
    monkeypatch.setitem(quantization._QUANTIZE, "int8", lambda weight: quantization._int8(weight * 3))
    with pytest.raises(LoadError, match="int8 changed the logits by"):
        quantize_engine(model, "int8", check, RankInfo(0, 0, 1, 1), CPU)


@pytest.mark.parametrize(
    ("mode", "dtype", "words"),
    [
        ("fp8", BF16, ["fp8", "GPU", "8.9", "int8"]),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(mode: str, dtype: torch.dtype, words: list[str]) -> None:
    with pytest.raises(LoadError) as raised:
        check_device(mode, dtype, CPU)
    assert all(word in str(raised.value) for word in ["deepspeed.quantization", *words])


@pytest.mark.parametrize(
    ("capability", "mode", "dtype", "words"),
    [
        ((8, 0), "fp8", BF16, ["8.9", "8.0", "int8"]),
        ((7, 5), "int4", BF16, ["8.0", "7.5"]),
        ((9, 0), "fp8", torch.float32, ["fp8", "float32", "deepspeed.dtype"]),
        ((9, 0), "int4", torch.float16, ["int4", "float16", "deepspeed.dtype: bf16"]),
        ((9, 0), "int4", torch.float32, ["int4", "float32", "deepspeed.dtype: bf16"]),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], mode: str, dtype: torch.dtype, words: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(LoadError) as raised:
        check_device(mode, dtype, torch.device("cuda:0"))
    assert all(word in str(raised.value) for word in words)


def test_without_torchao_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(LoadError, match=r"install torchao==0\.18\.0"):
        check_device("int8", BF16, CPU)


@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_what_works_is_not_refused(mode: str, dtype: torch.dtype) -> None:
    check_device(mode, dtype, CPU)
