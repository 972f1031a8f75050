"""What all ranks do in the next step. `parallel.plan_channel` carries it from rank 0 to the others.

A plan (the field's scheduler output) is a short list of integers; every step starts with one, so every call of the
handler holds a collective (ranks above 0 lose calls otherwise) and all ranks see the same requests. Decides nothing
(`scheduler`), computes nothing (`runner.autotp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class Admission:
    """A prompt that takes the next free row.

    Attributes:
        tokens: the part of the prompt to compute, at least its last token.
        source: the row of the cache that holds the part before it.
        shared: the length of that part; 0 = none, and `source` means nothing.
        all_logits: the logits of every token of the prompt are wanted, not only the last one's.
        continues: the part before lies in the last live row already, where the prompt goes on; only the first
            admission of a plan may say so, and `source` means nothing.
        complete: False = the rest of the prompt comes in later steps. Until then its row is not decoded and stays the
            last one; only the last admission of a plan may say so.
    """

    tokens: tuple[int, ...]
    source: int = 0
    shared: int = 0
    all_logits: bool = False
    continues: bool = False
    complete: bool = True


@dataclass(frozen=True)
class Plan:
    """One step: keep, evict, then decode the live rows whose prompts are complete and prefill the admitted prompts, in
    either order or in one pass.

    Attributes:
        keep: live rows whose keys and values are copied to a row of the prefix cache, (row, copy), before evictions.
        evict: rows to free, in this order; other rows move as `moves` says.
        tokens: the input token of each row to decode after the evictions; empty = no decode in this step.
        ahead: the input tokens are those that the step before chose for its rows, on rank 0's device; `tokens` holds
            as many zeros. All live rows are decoded; there are no evictions and no prompts.
        admit: the prompts to prefill; each takes the next free row, or goes on in the last one.
        last: the handler's call ends after this step.
        rewind: the step before, which was launched ahead, is void: each live row is one token shorter again.
    """

    keep: tuple[tuple[int, int], ...] = ()
    evict: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    admit: tuple[Admission, ...] = ()
    last: bool = False
    ahead: bool = False
    rewind: bool = False

    def encode(self) -> list[int]:
        """Length-prefixed integers, each below 2**24, so that fp32 holds them exactly."""
        numbers = [self.last + 2 * self.ahead + 4 * self.rewind, 2 * len(self.keep)]
        for pair in self.keep:
            numbers += pair
        numbers += [len(self.evict), *self.evict, len(self.tokens), *self.tokens, len(self.admit)]
        for admission in self.admit:
            flags = admission.all_logits + 2 * admission.continues + 4 * admission.complete
            numbers += [admission.source, admission.shared, flags]
            numbers += [len(admission.tokens), *admission.tokens]
        return numbers

    @classmethod
    def decode(cls, numbers: list[int]) -> Plan:
        values = iter(numbers)

        def take() -> tuple[int, ...]:
            return tuple(islice(values, next(values)))

        flags, keep, evict, tokens = next(values), take(), take(), take()
        admit = []
        for _ in range(next(values)):
            source, shared, kind = next(values), next(values), next(values)
            admit.append(Admission(take(), source, shared, bool(kind & 1), bool(kind & 2), bool(kind & 4)))
        pairs = tuple(zip(keep[::2], keep[1::2], strict=True))
        return cls(pairs, evict, tokens, tuple(admit), bool(flags & 1), bool(flags & 2), bool(flags & 4))


def moves(row: int, live: int, has_part: bool) -> list[tuple[int, int]]:
    """Which rows move where, (from, to), when `row` of `live` is freed: the last one into the hole.

    Args:
        has_part: the last row's prompt is not complete: it stays behind all others, and the one before it moves.
    """
    last = live - 1
    pairs = [(last - 1, row), (last, last - 1)] if has_part and row < last else [(last, row)]
    return [(source, target) for source, target in pairs if source != target]
