"""Several prompts as one pass: one behind the other, each seeing its own tokens only.

A prompt whose beginning lies in the cache already brings only the rest; its tokens then see the cells of the whole
prompt. Makes index and mask tensors on the CPU; the pass itself is `forward_pass`'s.
"""

from __future__ import annotations

from functools import cached_property

import torch

from dsserve.core.step_plan import Admission

# The pass is padded on the right to one of these lengths, then to multiples of half the last: each new shape costs 6 to
# 100 ms the first time on a CPU.
PREFILL_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Padding is one more prompt, number -1, which sees itself: a token that sees nothing would be NaN.
PADDING = -1


class PackedPrompts:
    """The tensors of one prefill pass; T is the padded number of tokens, S that of the cells they read.

    Attributes:
        total: the prompts' tokens, without padding.
        tokens: `[T]`, int64, zeros behind the last prompt.
        positions: `[T]`, of each token in its own prompt.
        cells: `[n]` where the n real tokens' keys and values go.
        lengths: of the prompts, and of the padding; where nothing is read of the cache, each sees itself alone.
        longest: of the prompts' parts, in tokens.
        prompts: `[T]`, the number of each token's prompt, -1 for padding.
        wanted: the tokens whose logits are computed.
        wants_all: some prompt wants the logits of all its tokens.
        read: `[3, S]`, the cells that attention reads under a mask, their positions and prompts, or None where the
            pass's own tokens are all there is.
    """

    def __init__(self, prompts: tuple[Admission, ...], first_row: int, capacity: int) -> None:
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        shared = torch.tensor([prompt.shared for prompt in prompts])
        self.total = total = int(lengths.sum())
        padding = prefill_bucket(total) - total
        rows = torch.arange(first_row, first_row + len(prompts)) * capacity
        ends = lengths.cumsum(0)
        positions = torch.arange(total) + (shared - ends + lengths).repeat_interleave(lengths)
        self.tokens = torch.tensor([token for prompt in prompts for token in prompt.tokens] + [0] * padding)
        self.positions = _pad(positions, padding, 0)
        self.cells = rows.repeat_interleave(lengths) + positions
        self.wanted = _wanted(prompts)
        self.lengths = [*lengths.tolist(), *([padding] if padding else [])]
        self.longest = int(lengths.max())
        self._ends = ends
        self.wants_all = any(prompt.all_logits for prompt in prompts)
        self.prompts = _pad(torch.arange(len(prompts)).repeat_interleave(lengths), padding, PADDING)
        self._firsts, self._seen = rows, lengths + shared
        self._reads = bool(shared.any())

    @cached_property
    def read(self) -> torch.Tensor | None:
        """See above; only passes under a mask need it."""
        if not self._reads:
            return None
        total = int(self._seen.sum())
        padding = prefill_bucket(total + 1) - total
        positions = torch.cat([torch.arange(length) for length in self._seen.tolist()])
        cells = self._firsts.repeat_interleave(self._seen) + positions
        prompts = torch.arange(len(self._seen)).repeat_interleave(self._seen)
        return torch.stack([_pad(cells, padding, 0), _pad(positions, padding, 0), _pad(prompts, padding, PADDING)])

    def spans(self, columns: int, length: int) -> torch.Tensor:
        """`PromptSpans.table`, `[3, columns]`, of a pass padded to `length` tokens: padding sees nothing."""
        behind = columns - len(self._ends)
        rows = (_pad(self._ends, behind - 1, length), _pad(self._firsts, behind, 0), _pad(self._seen, behind, 0))
        return torch.stack([torch.nn.functional.pad(rows[0], (1, 0)), *rows[1:]]).to(torch.int32)

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """`[1, 1, T, S]`, additive. One prompt alone needs none: attention is causal, padding lies behind."""
        if len(self._ends) == 1 and self.read is None:
            return None
        prompts, positions = self.prompts.to(device), self.positions.to(device)
        read_prompts, read_positions = prompts, positions
        if self.read is not None:
            _, read_positions, read_prompts = self.read.to(device)
        visible = (prompts[:, None] == read_prompts) & (positions[:, None] >= read_positions)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~visible, float("-inf"))[None, None]


def prefill_bucket(length: int) -> int:
    """The padded length of a pass of `length` tokens."""
    for bucket in PREFILL_BUCKETS:
        if length <= bucket:
            return bucket
    step = PREFILL_BUCKETS[-1] // 2
    return -(-length // step) * step


def _wanted(prompts: tuple[Admission, ...]) -> torch.Tensor:
    wanted: list[int] = []
    end = 0
    for prompt in prompts:
        end += len(prompt.tokens)
        wanted += range(end - len(prompt.tokens), end) if prompt.all_logits else [end - 1]
    return torch.tensor(wanted)


def _pad(values: torch.Tensor, count: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, count), value=value)
