"""The Triton kernel of `rank_sum`: sum over the ranks, addition to the residual, norm. Importing this needs Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsserve.kernels import pdl
from dsserve.kernels.elementwise_triton import warps
from dsserve.kernels.pdl import wait_for_inputs
from dsserve.parallel.symmetric_memory import Peers

_ALIGNMENT = 16  # bytes that a thread reads at once


@triton.jit
def _place_of(places, peers, peer: tl.constexpr):
    """One of the addresses `places` of `symmetric_memory`."""
    return tl.sum(tl.where(peers == peer, places, 0), 0)


@triton.jit
def _wait_for_ranks(
    flag_places, epochs_ptr, late_ptr, row, spins, RANK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr
):  # fmt: skip
    """Tells all ranks that this one's part of the row is there, and waits for theirs; of all at once, since one word
    over NVLink takes a microsecond.

    Each rank counts its sums. A flag holds another rank's count, which it writes over NVLink; a count may wrap. Of more
    rows than a GPU runs programs at once, all GPUs begin with the same ones: programs start in the order of their ids,
    as they do on every GPU so far, though CUDA does not promise it.
    """
    peers = tl.arange(0, PEERS)
    are_others = (peers < WORLD) & (peers != RANK)
    own = _place_of(flag_places, peers, RANK).to(tl.pointer_type(tl.int32)) + row * WORLD
    epoch = tl.load(epochs_ptr + row) + 1
    theirs = flag_places.to(tl.pointer_type(tl.int32)) + row * WORLD + RANK
    tl.atomic_xchg(theirs, tl.zeros([PEERS], tl.int32) + epoch, mask=are_others, sem="release", scope="sys")
    tl.debug_barrier()  # every thread has read the count before one of them raises it
    tl.store(epochs_ptr + row, epoch)
    flags = own + tl.where(are_others, peers, RANK)
    behind, left = _missing(flags, are_others, epoch), spins
    while (behind > 0) & (left != 0):
        behind = _missing(flags, are_others, epoch)
        left -= 1
    if behind > 0:
        tl.store(late_ptr, 1)
    tl.debug_barrier()  # what one thread has seen counts for all


@triton.jit
def _missing(flags, are_others, epoch):
    """How far the last of the other ranks is behind."""
    seen = tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flags], dtype=tl.int32, is_pure=False, pack=1
    )
    return tl.max(tl.where(are_others, epoch - seen, 0), 0)


@triton.jit
def _add_norm(
    part_ptr, places_ptr, flag_places_ptr, epochs_ptr, late_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr,
    part_row, residual_row, eps, spins,
    RANK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    ALIGN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    inside = at < SIZE
    kind = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if WORLD > 1:
        peers = tl.arange(0, PEERS)
        places = tl.load(places_ptr + peers, mask=peers < WORLD, other=0)
        flag_places = tl.load(flag_places_ptr + peers, mask=peers < WORLD, other=0)
    wait_for_inputs(EARLY)
    residual = tl.load(residual_ptr + row * residual_row + at, mask=inside, other=0.0).to(tl.float32)
    if WORLD > 1:
        _wait_for_ranks(flag_places, epochs_ptr, late_ptr, row, spins, RANK, WORLD, PEERS)
        part = tl.zeros([PAD], tl.float32)
        for peer in tl.static_range(WORLD):  # in the order of ranks, so that all of them get the same sum
            source = tl.multiple_of(_place_of(places, peers, peer).to(tl.pointer_type(kind)), ALIGN) + row * SIZE
            part += tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    else:
        part = tl.load(part_ptr + row * part_row + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded where torch would: after the ranks' sum, the addition, and before the weight is applied.
    total = (part.to(kind).to(tl.float32) + residual).to(kind)
    tl.store(sum_ptr + row * SIZE + at, total, mask=inside)
    x = total.to(tl.float32)
    scaled = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(kind)
    tl.store(out_ptr + row * SIZE + at, weight * scaled, mask=inside)


def add_norm(
    part: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    peers: Peers | None = None,
    spins: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`part + residual` and its norm, `[n, H]` each; with `symmetric_memory` the parts of all ranks are summed before.

    Args:
        part: `[n, H]`; with `symmetric_memory` this rank's own in their memory.
        peers: where the ranks' parts lie.
        spins: how often a program looks for another rank's part before it goes on without; -1 = for ever.
    """
    rows, size = residual.shape
    total, out = (torch.empty(rows, size, dtype=residual.dtype, device=residual.device) for _ in range(2))
    pad = triton.next_power_of_2(size)
    # What Triton cannot know of addresses that lie in memory: without it a thread reads one value at a time.
    align = _ALIGNMENT if size * part.dtype.itemsize % _ALIGNMENT == 0 else part.dtype.itemsize
    if peers is None:
        rank, world, shared = 0, 1, (part,) * 4  # the kernel does not look at them
    else:
        rank, world, shared = peers.rank, peers.world_size, (peers.places, peers.flags, peers.epochs, peers.late)
    launch = pdl.options(part.device)
    _add_norm[(rows,)](
        part, *shared, residual, weight, total, out, part.stride(0), residual.stride(0), eps, spins,
        RANK=rank, WORLD=world, PEERS=triton.next_power_of_2(world), SIZE=size, PAD=pad, ALIGN=align,
        num_warps=warps(pad), **launch,
    )  # fmt: skip
    return total, out
