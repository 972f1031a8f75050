"""What kernel injection refuses before anything is loaded, and how it says so; masks and the workspace's book."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dsserve.core.errors import LoadError
from dsserve.injection.attempt import KernelInjection
from dsserve.injection.cache import KernelCache
from dsserve.injection.families import FAMILIES, check_device, check_model
from dsserve.injection.inject import _refuse_beams, check_injection
from dsserve.injection.mask import additive, as_ones, in_window
from dsserve.injection.op import load_op
from dsserve.injection.workspace import Workspace, WorkspaceError, WorkspaceSize
from dsserve.parallel.rank import RankInfo
from tests.programs.injection.kernels import softmax
from tests.programs.injection.models import make_config

FP16 = torch.float16
MEND = "set replace_with_kernel_inject: false (AutoTP)"


def refusal(config: Any, tp_size: int = 1, max_tokens: int = 1024, dtype: torch.dtype = FP16) -> str:
    with pytest.raises(LoadError) as caught:
        check_model(config, tp_size, dtype, max_tokens)
    return str(caught.value)


def test_an_architecture_without_kernels_is_refused_with_those_that_have_some() -> None:
    text = refusal(AutoConfig.for_model("qwen2"))
    assert "qwen2 has no kernels" in text and MEND in text
    assert all(name in text for name in FAMILIES)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gptj", "gpt_neo", "gpt_neox", "llama", "llama-gqa", "bert"])
def test_real_shapes_are_served(name: str) -> None:
    check_model(make_config(name, "real"), 2, FP16, 512)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope type llama3"),
        ("llama", {"attention_bias": True}, "attention_bias: true"),
        ("llama", {"head_dim": 32}, "head_dim 32"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu (only silu)"),
        ("gpt2", {"n_inner": 1000}, "n_inner 1000 (only 4 * hidden_size)"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: relu"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual: false"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("opt", {"enable_bias": False}, "enable_bias: false"),
        ("bert", {"is_decoder": True}, "is_decoder: true"),
    ],
)
def test_what_the_kernels_compute_wrongly_is_refused(name: str, changes: dict[str, Any], says: str) -> None:
    config = make_config(name, "real")
    for key, value in changes.items():
        setattr(config, key, value)
    text = refusal(config)
    assert says in text and text.endswith(MEND)


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_work() -> None:
    text = refusal(make_config("gpt2", "real"), tp_size=5)
    assert "12 attention heads on 5 ranks (torchrun.nproc-per-node may be 1, 2, 3, 4, 6, 12)" in text


def test_contexts_beyond_the_softmax_are_refused() -> None:
    assert "max_out_tokens 9000: the kernels' softmax ends at 8192" in refusal(
        make_config("opt", "real"), max_tokens=9000
    )


def test_a_cpu_and_fp32_are_refused_with_the_reason() -> None:
    with pytest.raises(LoadError, match="the kernels need a GPU"):
        check_device(torch.device("cpu"), FP16)
    with pytest.raises(LoadError, match="multiply in half precision"):
        check_device(torch.device("cuda"), torch.float32)
    check_device(torch.device("cuda"), torch.bfloat16)


def test_masks_become_summands_without_gaps() -> None:
    mask = torch.tensor([[False, True, True, True]])[:, None, None, :].expand(2, 1, 3, 4)
    found = additive(mask, 2, 3, FP16)
    assert found.shape == (2, 1, 3, 3) and found.is_contiguous() and found.dtype is FP16
    assert (found[..., 0] == torch.finfo(FP16).min).all() and (found[..., 1:] == 0).all()
    assert (as_ones(found)[..., 0] == 1).all() and (as_ones(found)[..., 1:] == 0).all()
    with pytest.raises(ValueError, match="the kernels need"):
        additive(mask, 2, 5, FP16)


class Layer:
    """DeepSpeed's layer, as far as the workspace touches it."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(hidden_size=64, min_out_tokens=1, max_out_tokens=1)
        self.layer_past: Any = None
        self.resets = 0
        self.taken: tuple[int, ...] = ()

    def allocate_workspace(self, size: tuple[int, ...]) -> None:
        self.taken = size

    def reset_cache(self) -> None:
        self.resets += 1


def workspace(rows: int = 2, tokens: int = 8) -> tuple[Workspace, Layer]:
    layer = Layer()
    return Workspace([layer], WorkspaceSize(rows, tokens, rows)), layer


@pytest.mark.parametrize("new", [48, 1])
def test_a_window_is_a_mask_since_the_kernels_own_hides_too_much(new: int) -> None:
    """Over softmax.cu's arithmetic: each token's probabilities are those of the tokens in its window."""
    tokens, window, rows = 48, 10, 2
    torch.manual_seed(0)
    scores = torch.randn(rows, 3, new, tokens)
    base = torch.zeros(rows, 1, 1, tokens)
    base[1, ..., :5] = torch.finfo(torch.float32).min
    position, column = torch.arange(tokens)[tokens - new :, None], torch.arange(tokens)
    seen = (column <= position) & (column > position - window) & (base == 0)
    wanted = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    alive = seen.any(-1).expand(rows, 3, new)  # padding sees nothing

    def probabilities(mask: torch.Tensor, local: bool) -> torch.Tensor:
        found = scores.clone()
        softmax(found, mask, None, 1.0, new > 1, local, window)
        return found[alive]

    mask = in_window(base, window, tokens, torch.zeros(rows, new, 4))
    assert mask is not None
    assert torch.allclose(probabilities(mask, local=False), wanted[alive], atol=1e-5)
    assert not torch.allclose(probabilities(base, local=True), wanted[alive], atol=1e-2)


def test_a_window_that_holds_all_tokens_changes_no_mask() -> None:
    hidden = torch.zeros(2, 1, 4)
    assert in_window(None, 8, 8, hidden) is None
    beyond = in_window(None, 8, 9, hidden)
    assert beyond is not None and (beyond < 0).sum() == 2 and bool((beyond[..., 0] < 0).all())


def test_the_workspace_follows_one_batch_and_refuses_what_it_does_not_hold() -> None:
    book, layer = workspace()
    assert layer.taken == (2, 8, 64) and layer.config.max_out_tokens == layer.config.min_out_tokens == 8
    cache = KernelCache()
    book.begin(torch.zeros(2, 5, 64), cache)
    book.begin(torch.zeros(2, 1, 64), cache)
    assert book.tokens == cache.get_seq_length() == 6 and layer.resets == 1
    with pytest.raises(WorkspaceError, match="2 rows of 6 tokens"):
        book.begin(torch.zeros(1, 1, 64), cache)  # a row less
    with pytest.raises(WorkspaceError, match="go on by one token"):
        book.begin(torch.zeros(2, 2, 64), cache)
    with pytest.raises(WorkspaceError, match="1 rows of 9 tokens: the kernels' workspace has 2 rows of 8"):
        book.begin(torch.zeros(1, 9, 64), KernelCache())
    with pytest.raises(WorkspaceError, match="3 rows of 1 tokens"):
        book.begin(torch.zeros(3, 1, 64), KernelCache())
    book.begin(torch.zeros(1, 1, 64), KernelCache())  # a prompt of one token is a new batch
    assert book.tokens == 1 and layer.resets == 2


def test_the_workspace_has_room_for_activations_that_are_whole_on_every_rank() -> None:
    config = SimpleNamespace(
        hidden_size=512, mp_size=2, heads=8, intermediate_size=2048, mlp_act_func_type=None
    )  # fmt: skip
    assert WorkspaceSize.plan(4, 64, config).taken_rows == 4
    config.mp_size = 4
    assert WorkspaceSize.plan(4, 64, config).taken_rows > 4
    config.heads, config.mp_size = 32, 1
    with pytest.raises(LoadError, match="count scores in 32 bits; lower max_out_tokens to 2047"):
        WorkspaceSize.plan(16, 4096, config)


@pytest.fixture
def no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    monkeypatch.setattr(BaseOp, "inference_module", None)


def test_a_missing_compiler_is_named_at_once(monkeypatch: pytest.MonkeyPatch, no_op: None) -> None:
    monkeypatch.setattr("dsserve.injection.op.missing_tools", lambda: ["nvcc", "ninja"])
    with pytest.raises(LoadError, match=r"nvcc and ninja not found.*make ops"):
        load_op()


def test_a_compilation_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, no_op: None) -> None:
    def fail(self: Any, verbose: bool) -> None:
        raise RuntimeError("Error building extension\nnvcc fatal: unknown option\n")

    monkeypatch.setattr("dsserve.injection.op.missing_tools", list)
    monkeypatch.setattr("deepspeed.ops.op_builder.InferenceBuilder.load", fail)
    with pytest.raises(LoadError) as caught:
        load_op()
    assert "Error building extension" in str(caught.value) and "\n" not in str(caught.value)


def test_the_op_is_loaded_once(monkeypatch: pytest.MonkeyPatch, no_op: None) -> None:
    loads: list[int] = []
    said: list[str] = []
    monkeypatch.setattr("dsserve.injection.op.missing_tools", list)
    monkeypatch.setattr("deepspeed.ops.op_builder.InferenceBuilder.load", lambda self, verbose: loads.append(1) or 7)
    assert load_op(said.append) >= 0 and load_op(said.append) == 0
    assert len(loads) == 1 and len(said) == 1 and "loaded, in" in said[0]


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"tp_size": 1, "dtype": FP16, "init": {}, "checkpoint": None, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": "checkpoints.json"}, "deepspeed.checkpoint"),
        ({"init": {"enable_cuda_graph": True}}, "enable_cuda_graph"),
        ({"init": {"max_out_tokens": 10_000}}, "max_out_tokens 10000"),
    ],
)
def test_settings_that_the_kernels_cannot_follow_are_refused(changes: dict[str, Any], says: str) -> None:
    model = SimpleNamespace(config=make_config("opt", "real"))
    with pytest.raises(LoadError, match=says):
        check_injection(model, settings(**changes), torch.device("cuda"))


def test_a_second_model_in_the_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsserve.injection.inject.has_injected_model", lambda: True)
    with pytest.raises(LoadError, match="one workspace a process"):
        check_injection(SimpleNamespace(config=make_config("opt", "real")), settings(), torch.device("cuda"))


def test_beams_are_refused_by_generate() -> None:
    module = SimpleNamespace(generate=lambda *_, **__: "text", generation_config=SimpleNamespace(num_beams=1))
    _refuse_beams(module)
    assert module.generate(max_new_tokens=3) == "text"
    with pytest.raises(ValueError, match="num_beams"):
        module.generate(num_beams=4)
    module.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams"):
        module.generate()


class Attempt(KernelInjection):
    """With settings that allow AutoTP, or not."""

    def __init__(self, may_fall_back: bool) -> None:
        made = SimpleNamespace(may_fall_back=may_fall_back)
        super().__init__(made, RankInfo(0, 0, 1, 1), torch.device("cpu"))  # type: ignore[arg-type]


def test_whatever_deepspeed_raises_is_a_refusal_of_one_line() -> None:
    attempt = Attempt(may_fall_back=True)
    with attempt._deciding():
        raise AttributeError("'LlamaAttention' object has no attribute 'x'\nmore")
    assert attempt.refusal is not None and "AttributeError" in attempt.refusal and "\n" not in attempt.refusal
    with pytest.raises(LoadError, match="no attribute 'x'"), Attempt(may_fall_back=False)._deciding():
        raise AttributeError("no attribute 'x'")
    with pytest.raises(KeyboardInterrupt), Attempt(may_fall_back=True)._deciding():
        raise KeyboardInterrupt
