"""The self-check's longer text: proves the engine beyond the numbers of a config that may begin to matter with length.

The first check looks at 24 tokens. Windows, chunks and their like begin later, under names that `exact_context` may not
know. The reference is the sharded module without the engine's cache and masks, which the first check has proven.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.modeling.self_check import LENGTH, SelfCheck
from dsserve.runner.autotp import ModelRunner

logger = logging.getLogger(__name__)

_NAMES = re.compile("window|chunk|floor|topk|top_k|block|local|segment|horizon|sparse|recent|keep")
_OTHERS = re.compile("expert|vocab|layer|group|rank|pattern")
# Tokens of the text at most: 2048 take a fraction of a second on a GPU, 512 of a small model about one on a CPU.
_MOST = {"cuda": 2048, "cpu": 512}
_DECODED, _SHORT = 8, 5


@dataclass(frozen=True)
class LongCheck:
    """A long text and the beginning of it as a short one beside it, and what the module makes of their last tokens.

    Attributes:
        names: the members of config.json that the long text goes beyond, as `name number`.
        least: of their numbers.
    """

    long: SelfCheck
    short: SelfCheck
    names: tuple[str, ...]
    least: int

    @classmethod
    def capture(
        cls, module: Any, check: SelfCheck | None, max_model_len: int, device: torch.device
    ) -> LongCheck | None:
        """Runs both texts through the sharded module, on all ranks alike; None where nothing may begin with length.

        Args:
            check: the first check, whose limit counts; None = it is off, and so is this one.
        """
        if check is None:
            return None
        numbers = suspects(module.config.get_text_config(), max_model_len)
        most = min(_MOST[device.type], max_model_len) - _DECODED - 1
        within = {name: number for name, number in numbers.items() if number <= most}
        beyond = [f"{name} {number}" for name, number in numbers.items() if number > most]
        if beyond:
            logger.info("[dsserve] self-check: %s lie beyond the %d tokens that it reads", ", ".join(beyond), most)
        if not within:
            return None
        length = max(within.values()) + _DECODED + 1
        vocabulary = module.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(1))
        long = _reference(module, check, tokens, _DECODED + 1, device)
        short = _reference(module, check, tokens[: _SHORT + 2 + _DECODED], _DECODED + 3, device)
        return cls(long, short, tuple(f"{name} {number}" for name, number in within.items()), min(within.values()))

    def verify(self, runner: ModelRunner) -> float:
        """Reads the long text in two parts beside the short one, decodes both; returns the largest error.

        Raises:
            LoadError: the logits are not the module's, with the length up to which they may be.
        """
        rows = self._teacher_force(runner)
        checks = (self.short, self.long) if len(rows) > 1 else (self.long,)
        error = max(check.error(row) for check, row in zip(checks, rows, strict=True))
        if error > self.long.limit:
            raise LoadError(
                f"self-check failed: texts longer than {' or '.join(self.names)} of config.json changed the logits by "
                f"{error:.2e} (limit {self.long.limit:.0e}): this engine is not exact there; set "
                f"handler.max_model_len: {self.least}"
            )
        return error

    def _teacher_force(self, runner: ModelRunner) -> list[torch.Tensor]:
        """Logits of the short text and of the long one, or of the long one alone where there is one row, `[n, V]`."""
        long, short = self.long.token_ids.tolist(), self.short.token_ids.tolist()
        trial, has_short = runner.trial(), runner.rows > 1
        beside: list[torch.Tensor] = [trial.logits((0, short[:_SHORT]))] if has_short else []
        next_short = iter(short[_SHORT:])

        def step(tokens: list[int]) -> torch.Tensor:
            parts = [(0, [next(next_short)])] if has_short else []
            found = trial.logits(*parts, (1 if has_short else 0, tokens))
            beside.extend([found[:1]] if has_short else [])
            return found[-1:]

        read = len(long) - _DECODED
        step(long[: read // 2])
        last = [step(long[read // 2 : read])]
        last += [step([token]) for token in long[read:]]
        return [torch.cat(rows) for rows in (beside, last) if rows]


@torch.inference_mode()
def _reference(module: Any, check: SelfCheck, text: torch.Tensor, wanted: int, device: torch.device) -> SelfCheck:
    """What the module makes of the last `wanted` tokens of a text `[T]`."""
    output = module(input_ids=text[None].to(device), use_cache=False, logits_to_keep=wanted)
    return SelfCheck(text, output.logits[0].float().cpu(), check.dtype, check.limit)


def suspects(config: Any, max_model_len: int) -> dict[str, int]:
    """Numbers of a text config within the served context that something may begin at. Those that are known to matter
    are not within it: `exact_context` bounds it by them."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and LENGTH < value < max_model_len - 1
        and _NAMES.search(name) and not _OTHERS.search(name)
    }  # fmt: skip
