"""What injected layers are put to: batches of prompts, decoded under teacher forcing, beside transformers in fp32.

Every row of the reference runs alone and without padding. Every case returns a `Result`; its errors are
||out - ref|| / ||ref|| of logits, the largest of all rows and steps. A token may differ where the reference's two best
logits are closer than errors of the limit's size make them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsserve.injection.batch import KernelBatch
from dsserve.injection.cache import KernelCache
from dsserve.injection.workspace import WorkspaceError
from tests.programs.injection.models import Size

Prompts = list[list[int]]
# Two logits, each off by the typical error; three standard deviations.
TIE = 6.0


@dataclass
class Result:
    """What one case gave: largest errors, tokens that differ, and how many of them no tie explains."""

    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    differ: int = 0
    unexplained: int = 0
    ms_a_step: float = 0.0
    note: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)

    def passes(self, limit: float) -> bool:
        return self.prefill <= limit and self.decode <= limit and not self.unexplained and not self.note


class Pair:
    """The reference and the model with injected kernels.

    Args:
        reference: transformers' model in fp32.
        injected: DeepSpeed's module in the dtype under test.
        limit: of the errors.
    """

    def __init__(self, reference: Any, injected: Any, size: Size, limit: float) -> None:
        self.reference, self.injected = reference, injected
        self.size, self.limit = size, limit
        self.vocabulary = injected.config.vocab_size
        self.device = next(injected.parameters()).device
        self._generator = torch.Generator().manual_seed(7)

    def prompts(self, *lengths: int) -> Prompts:
        return [torch.randint(self.vocabulary, (n,), generator=self._generator).tolist() for n in lengths]

    def _expect(self, prompt: list[int], steps: int) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
        """One row alone: logits of the prompt `[S, V]`, of each further token `[V]`, and the tokens, greedy."""
        ids = torch.tensor([prompt], device=self.reference.device)
        output = self.reference(input_ids=ids, use_cache=True)
        prefill, tokens, logits = output.logits[0], [], []
        last = prefill[-1]
        for _ in range(steps):
            tokens.append(int(last.argmax()))
            ids = torch.tensor([[tokens[-1]]], device=self.reference.device)
            output = self.reference(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
            last = output.logits[0, -1]
            logits.append(last)
        return prefill, logits, tokens

    @torch.inference_mode()
    def compare(self, prompts: Prompts, steps: int) -> Result:
        """One batch, padded on the left where prompts differ in length."""
        expected = [self._expect(prompt, steps) for prompt in prompts]
        result = Result(steps=steps)
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(rows, device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        padded = not bool(mask.all())
        cache = KernelCache()
        output = self._forward(ids, mask, padded, cache)
        for row, prompt in enumerate(prompts):
            found, wanted = output[row, longest - len(prompt) :].float(), expected[row][0].to(self.device)
            result.prefill = max(result.prefill, error(found, wanted), error(found[-1], wanted[-1]))
            self._token(result, found[-1], wanted[-1])
        started = None
        for step in range(steps):
            if step == steps // 2:
                self._synchronize()
                started = time.perf_counter()
            ids = torch.tensor([[tokens[step]] for _, _, tokens in expected], device=self.device)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            output = self._forward(ids, mask, padded, cache)
            for row, (_, logits, _) in enumerate(expected):
                found, wanted = output[row, -1].float(), logits[step].to(self.device)
                result.decode = max(result.decode, error(found, wanted))
                self._token(result, found, wanted)
        if started is not None:
            self._synchronize()
            result.ms_a_step = 1e3 * (time.perf_counter() - started) / (steps - steps // 2)
        return result

    @torch.inference_mode()
    def drive(self, prompts: Prompts, steps: int) -> Result:
        """The same through `KernelBatch`, as requests are served."""
        batch = KernelBatch(self.injected, self.size.tokens, self.device)
        expected = [self._expect(prompt, steps) for prompt in prompts]
        result = Result(steps=steps)
        for found, (prefill, _, _) in zip(batch.prefill(prompts).float(), expected, strict=True):
            wanted = prefill[-1].to(self.device)
            result.prefill = max(result.prefill, error(found, wanted))
            self._token(result, found, wanted)
        for step in range(steps):
            logits = batch.decode([tokens[step] for _, _, tokens in expected])
            for found, (_, further, _) in zip(logits.float(), expected, strict=True):
                wanted = further[step].to(self.device)
                result.decode = max(result.decode, error(found, wanted))
                self._token(result, found, wanted)
        return result

    @torch.inference_mode()
    def itself(self, is_encoder: bool) -> Result:
        """What the dtype alone does: transformers' own model in the place of the injected one, one long text."""
        ids = torch.tensor(self.prompts(self.size.tokens - 1), device=self.device)
        found, wanted = (model(input_ids=ids)[0][0].float() for model in (self.injected, self.reference))
        if is_encoder:
            return Result(prefill=error(found, wanted))
        return Result(prefill=max(map(error, found, wanted)))

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, padded: bool, cache: KernelCache) -> torch.Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {} if self.injected.config.model_type == "bloom" else {"position_ids": positions}
        attention_mask = mask if padded else None
        return self.injected(
            input_ids=ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra
        ).logits

    def _token(self, result: Result, found: torch.Tensor, wanted: torch.Tensor) -> None:
        if int(found.argmax()) == int(wanted.argmax()):
            return
        result.differ += 1
        gap = wanted.max() - wanted[found.argmax()]
        result.unexplained += bool(gap > TIE * self.limit * wanted.square().mean().sqrt())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def refuses(self, rows: int, tokens: int, steps: int) -> str:
        """Empty where a batch is refused at the step after `steps`, before the kernels see it; else what happened."""
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
        cache, mask = KernelCache(), torch.ones_like(ids)
        try:
            for step in range(steps + 1):
                refused_now = step == steps
                self._forward(ids, mask, False, cache)
                ids = ids[:, :1]
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        except WorkspaceError:
            return "" if refused_now else f"refused at step {step}"
        return "not refused"

    @torch.inference_mode()
    def generate(self, prompts: Prompts, steps: int) -> Result:
        """transformers' own `generate` on the injected module; each of its tokens is judged by the reference."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        output = self.injected.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0
        )
        result = Result(steps=steps)
        for row, prompt in enumerate(prompts):
            new = output[row, longest:].tolist()
            text = torch.tensor([prompt + new], device=self.reference.device)
            logits = self.reference(input_ids=text).logits[0]
            for step, token in enumerate(new):
                wanted = logits[len(prompt) - 1 + step]
                chosen = torch.full_like(wanted, -torch.inf)
                chosen[token] = 0
                self._token(result, chosen, wanted)
        return result

    @torch.inference_mode()
    def encode(self, prompts: Prompts) -> Result:
        """An encoder's last hidden states, padded on the right where prompts differ in length."""
        longest = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=self.device)
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts], device=self.device)
        found = self.injected(input_ids=ids, attention_mask=mask).last_hidden_state
        result = Result()
        for row, prompt in enumerate(prompts):
            alone = torch.tensor([prompt], device=self.reference.device)
            wanted = self.reference(input_ids=alone).last_hidden_state[0].to(self.device)
            result.prefill = max(result.prefill, error(found[row, : len(prompt)].float(), wanted))
        return result


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


def _refused(pair: Pair, rows: int, tokens: int, steps: int) -> Result:
    """A refusal, and a batch after it that is right."""
    note = pair.refuses(rows, tokens, steps)
    result = pair.compare(pair.prompts(9, 9), 4)
    result.note = note
    return result


Case = Callable[[Pair], Result]
# In this order, in one process.
DECODER_CASES: dict[str, Case] = {
    "unpadded": lambda p: p.compare(p.prompts(*[p.size.tokens // 3] * 3), 16),
    "larger batch refused": lambda p: _refused(p, p.size.rows + 1, 5, 0),
    "padded": lambda p: p.compare(p.prompts(p.size.tokens // 3, 3, 20, 1), 16),
    "one token": lambda p: p.compare(p.prompts(1, 1), 12),
    "second batch": lambda p: p.compare(p.prompts(17, 17, 17, 17), 8),
    "long decode": lambda p: p.compare(p.prompts(5), p.size.tokens - 5),
    "overrun refused": lambda p: _refused(p, 2, p.size.tokens - 1, 2),
    "whole workspace": lambda p: p.compare(p.prompts(*[p.size.tokens - 2] * p.size.rows), 2),
    "served": lambda p: p.drive(p.prompts(13, 2, 1, 9), 10),
    "generate": lambda p: p.generate(p.prompts(11, 4, 1), 12),
    "one row": lambda p: p.compare(p.prompts(7), 8),
}
ENCODER_CASES: dict[str, Case] = {
    "unpadded": lambda p: p.encode(p.prompts(30, 30, 30)),
    "padded": lambda p: p.encode(p.prompts(40, 3, 20, 1)),
    "one token": lambda p: p.encode(p.prompts(1, 1)),
    "second batch": lambda p: p.encode(p.prompts(17, 17)),
    "whole workspace": lambda p: p.encode(p.prompts(*[p.size.tokens] * p.size.rows)),
}
