"""Several prompts in one flash call on a GPU: the kernel is there, and long passes in graphs are exact."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsserve.attention.decode import use_decode_attention
from dsserve.attention.prefill import has_flash
from dsserve.core.step_plan import Admission, Plan
from dsserve.kernels.ops import load_ops
from dsserve.modeling.fused_ops import use_fused_ops
from dsserve.runner.autotp import ModelRunner
from dsserve.runner.prefill_batch import PackedPrompts
from dsserve.runner.prefill_graphs import MOST_TOKENS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
HALVES = [torch.float16, torch.bfloat16]
SLOTS, CONTEXT = 24, 512
# ||out - ref|| / ||ref|| of logits that another order of sums explains.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_kernel_is_there(dtype: torch.dtype, head_dim: int) -> None:
    """Without it everything would still be right, and slow: a torch that renames it must be noticed."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch's flash kernel needs compute capability 8.0")
    assert has_flash(dtype, head_dim, torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_long_pass_of_many_prompts_in_a_graph_has_the_logits_of_each_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    device = torch.device("cuda", 0)
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    assert use_decode_attention(model) and use_fused_ops(model, load_ops(device))
    runner = ModelRunner(model, SLOTS, CONTEXT, device)
    runner.capture_graphs(is_leader=True, prefill_tokens=MOST_TOKENS)
    generator = torch.Generator().manual_seed(1)
    lengths = [30 + 7 * number for number in range(SLOTS - 4)]
    prompts = [tuple(torch.randint(2000, (length,), generator=generator).tolist()) for length in lengths]
    plan = Plan(admit=tuple(map(Admission, prompts)))
    packed = PackedPrompts(plan.admit, 0, CONTEXT)
    assert len(packed.tokens) > 1024 and runner._prefill_graphs is not None
    assert runner._prefill_graphs.find(packed) is not None, "the pass was not captured"
    together = runner.execute(plan)
    second = runner.execute(Plan(tokens=(7,) * len(prompts)))
    runner.execute(Plan(evict=tuple(reversed(range(len(prompts))))))
    assert together is not None and second is not None
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            wanted = model(torch.tensor([[*prompt, 7]], device=device), use_cache=False).logits[0, -2:].float()
        found = torch.stack([together.next[row], second.next[row]]).float()
        assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
