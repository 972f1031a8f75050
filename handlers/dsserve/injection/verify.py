"""Proves injected layers at load: logits of the untouched model beside those of the kernels.

Unpadded, padded, and token by token; encoders once. Does not judge which token is chosen.
"""

from __future__ import annotations

from typing import Any

import torch

from dsserve.injection.batch import KernelBatch
from dsserve.injection.families import family_of
from dsserve.injection.workspace import WorkspaceSize
from dsserve.modeling.self_check import SelfCheck, answers

# Tokens of the second row's prompt, so that it is padded, and of the prompts before token by token.
_SHORT, _PROMPT = 7, 12


@torch.inference_mode()
def verify_kernels(module: Any, size: WorkspaceSize, check: SelfCheck, device: torch.device) -> float:
    """The largest relative error of any way to compute the self-check's tokens.

    Args:
        module: the model with its kernels.
        size: of their workspace.

    Raises:
        LoadError: an error above the limit; the message says which way.
    """
    if not family_of(module.config).is_causal:
        return check.verify(answers(module, check.token_ids), "kernel injection")
    batch = KernelBatch(module, size.tokens, device)
    check = check.until(size.tokens)
    tokens = check.token_ids.tolist()
    worst = check.verify(batch.prefill([tokens], all_logits=True)[0], "kernel injection, prefill,")
    prompts = [tokens[:_PROMPT], tokens[:_SHORT]][: size.rows]
    steps = [batch.prefill(prompts)]  # [B, V] each
    for at in range(len(tokens) - len(prompts[0])):
        steps.append(batch.decode([tokens[len(prompt) + at] for prompt in prompts]))
    for row, prompt in enumerate(prompts):
        part = check.until(len(prompt) + len(steps) - 1)
        padded = "padded, " if row else ""
        logits = torch.stack([step[row] for step in steps])
        worst = max(worst, part.verify(logits, f"kernel injection, {padded}token by token,"))
    return worst
