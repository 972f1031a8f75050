"""Several prompts as one pass: one behind the other, each seeing its own tokens only.

A prompt whose beginning lies in the cache already brings only the rest; its tokens then see the cells of the whole
prompt. Makes index and mask tensors on the CPU; the pass itself is `model_runner`'s.
"""

from __future__ import annotations

import torch

from dsserve.generation.plan import Admission

# The pass is padded on the right to one of these lengths, then to multiples of half the last: each new shape costs 6 to
# 100 ms the first time on a CPU.
PREFILL_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# Padding is one more prompt, number -1, which sees itself: a token that sees nothing would be NaN.
PADDING = -1


class PackedPrompts:
    """The tensors of one prefill pass; T is the padded number of tokens, S that of the cells they read.

    Attributes:
        tokens: `[T]`, int64, zeros behind the last prompt.
        positions: `[T]`, of each token in its own prompt.
        cells: `[n]` where the n real tokens' keys and values go.
        lengths: of the prompts, and of the padding; where nothing is read of the cache, each sees itself alone.
        ends: `[n + 2]`, int32: 0, where each of n prompts ends, then T.
        prompts: `[T]`, the number of each token's prompt, -1 for padding.
        wanted: the tokens whose logits are computed.
        wants_all: some prompt wants the logits of all its tokens.
        read: `[S]` cells that attention reads, or None where the pass's own tokens are all there is.
        read_positions, read_prompts: `[S]`, of what is read, which else are the tokens themselves.
    """

    def __init__(self, prompts: tuple[Admission, ...], first_row: int, capacity: int) -> None:
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        shared = torch.tensor([prompt.shared for prompt in prompts])
        total = int(lengths.sum())
        padding = prefill_bucket(total) - total
        rows = torch.arange(first_row, first_row + len(prompts)) * capacity
        positions = torch.cat([torch.arange(p.shared, p.shared + len(p.tokens)) for p in prompts])
        self.tokens = torch.tensor([token for prompt in prompts for token in prompt.tokens] + [0] * padding)
        self.positions = _pad(positions, padding, 0)
        self.cells = rows.repeat_interleave(lengths) + positions
        self.wanted = _wanted(prompts)
        self.lengths = [*lengths.tolist(), *([padding] if padding else [])]
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.ends = _pad(ends, 1, len(self.tokens)).to(torch.int32)
        self.wants_all = any(prompt.all_logits for prompt in prompts)
        self.prompts = _pad(torch.arange(len(prompts)).repeat_interleave(lengths), padding, PADDING)
        self.read: torch.Tensor | None = None
        self.read_positions, self.read_prompts = self.positions, self.prompts
        if bool(shared.any()):
            self._read_whole(rows, lengths + shared)
        self._is_causal = len(prompts) == 1 and self.read is None

    def _read_whole(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        total = int(lengths.sum())
        padding = prefill_bucket(total + 1) - total
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        self.read = _pad(rows.repeat_interleave(lengths) + positions, padding, 0)
        self.read_positions = _pad(positions, padding, 0)
        self.read_prompts = _pad(torch.arange(len(rows)).repeat_interleave(lengths), padding, PADDING)

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """`[1, 1, T, S]`, additive. One prompt alone needs none: attention is causal, padding lies behind."""
        if self._is_causal:
            return None
        prompts, positions = self.prompts.to(device), self.positions.to(device)
        read_prompts, read_positions = self.read_prompts.to(device), self.read_positions.to(device)
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
