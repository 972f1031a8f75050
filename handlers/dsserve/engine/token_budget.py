"""How many tokens of prompts a step may read, so that neither the running texts nor the waiting ones stand still.

A long step reads prompts sooner, a short one keeps streams even. Pure arithmetic on counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsserve.core.step_input import PREFILL_BUCKETS

# Steps of so many tokens found memory at load. Where one does not, another program holds it, and gives it back.
SURE_TOKENS = PREFILL_BUCKETS[-1]


@dataclass
class TokenBudget:
    """Limits of a step, in tokens.

    Attributes:
        step: of any step, prompts and one of each text that it decodes (vLLM's `max_num_batched_tokens`).
        chunk: of a step in which running texts wait for prompts; half of them are the prompts' in any case.
        ratio: so many times as many as run, and more than one, must wait and find a row, for those that run to be few:
            then they wait once for a burst.
    """

    step: int
    chunk: int
    ratio: float = math.inf

    def __post_init__(self) -> None:
        self._sure = min(self.step, SURE_TOKENS), min(self.chunk, SURE_TOKENS)

    def prompts(self, decoded: int, joining: int) -> int:
        """Tokens of prompts in a step that decodes so many texts.

        Args:
            joining: texts that wait and have a row to go to.
        """
        if not decoded or (joining > 1 and joining >= self.ratio * decoded):
            return max(self.step - decoded, 1)
        return max(self.chunk - decoded, self.chunk // 2, 1)

    def halve(self, tokens: int) -> None:
        """A step of so many tokens had not the memory that it needs: from now on there are half as many at most."""
        self.step = max(1, min(tokens, self.step) // 2)
        self.chunk = min(self.chunk, self.step)

    def recover(self) -> None:
        """A prompt found memory: steps have `SURE_TOKENS` again, where they had fewer. Requests that are refused one
        after the other would slow down all others for good."""
        step, chunk = self._sure
        self.step, self.chunk = max(self.step, step), max(self.chunk, chunk)
