"""Whether a prefill's activations fit into a GPU's memory, asked of all ranks before any of them begins.

Weights, KV cache and the decode steps' buffers are taken at load; what can run out later is a prefill, whose
activations grow with its prompts. A rank that failed in the middle of one would leave the others in an all-reduce
without end. Covers prefill that is not captured: a graph has its memory, and where that of the logits it hands out runs
out, as in a decode step, the worker ends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsserve.core.step_input import padded_length
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo


class PrefillMemory:
    """Learns from passes what they take, and tries to get that much before the next one.

    Args:
        vocabulary: width of the logits, which a pass holds twice in fp32 at most.

    Attributes:
        device: whose memory it is.
    """

    def __init__(self, device: torch.device, rank: RankInfo, vocabulary: int) -> None:
        self.device = device
        self._rank = rank
        self._logits_bytes = 2 * 4 * vocabulary
        self._token_bytes = 0.0  # most that a token of any pass took
        self._longest, self._longest_bytes = 1, 0  # the pass of most tokens, and what it took
        self._before = 0  # bytes that were taken when the present pass began

    @property
    def is_limited(self) -> bool:
        """Whether an allocation can fail: on a CPU the kernel ends the process instead."""
        return self.device.type == "cuda"

    def run(
        self, prefill: Callable[[], torch.Tensor], tokens: int, logits: int, is_plain: bool = True
    ) -> torch.Tensor | None:
        """Carries out a pass of so many tokens and rows of logits, or returns None on all ranks where one of them has
        not the memory for it.

        Args:
            is_plain: it computes all of these tokens, and few logits, so that others of as many take as much.

        Raises:
            torch.OutOfMemoryError: a pass failed that should have fitted, and other ranks may wait within it.
        """
        if not self.is_limited:
            return prefill()
        if agree_on_least(int(self.has_room(tokens, logits)), self._rank):
            try:
                result = prefill()
            except torch.OutOfMemoryError:
                if self._rank.world_size > 1:
                    raise
            else:
                if is_plain:
                    self._learn(tokens)
                return result
        torch.cuda.empty_cache()  # so that fragments do not refuse the next pass
        return None

    def needed(self, tokens: int) -> int:
        """Bytes of activations of a pass of `tokens`, as far as earlier passes tell. With the longest of them L:

            tokens >= L: bytes(L) * tokens / L
            tokens <  L: min(tokens * largest bytes a token of any pass, bytes(L))

        A short pass needs more for each token, because expanded weights and the like do not grow with the tokens.
        """
        size = padded_length(tokens)
        if size >= self._longest:
            return self._longest_bytes * size // self._longest
        return min(int(size * self._token_bytes), self._longest_bytes)

    def has_room(self, tokens: int, logits: int) -> bool:
        """This rank's answer: the bytes are taken from the allocator and given back, so they are there for the pass,
        whose peak is measured from here on."""
        needed = self.needed(tokens) + logits * self._logits_bytes
        try:
            torch.empty(needed, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return False
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return True

    def _learn(self, tokens: int) -> None:
        """Allocations are known on the host as soon as the pass is launched. What stays is no activation; nor is what
        lay there before and went meanwhile: garbage that Python found. A pass of few tokens is padded, and takes what
        its padding takes."""
        others = max(self._before, torch.cuda.memory_allocated(self.device))
        taken, size = torch.cuda.max_memory_allocated(self.device) - others, padded_length(tokens)
        self._token_bytes = max(self._token_bytes, taken / size)
        if size == self._longest:
            self._longest_bytes = max(self._longest_bytes, taken)
        elif size > self._longest:
            self._longest, self._longest_bytes = size, taken
