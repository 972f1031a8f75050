"""The sum of a row-parallel layer over the ranks, the addition to the residual, and the norm that follows, in one step.

Apart they are an all-reduce and two small operations, three launches for a few kilobytes. Where GPUs read each other's
memory (`symmetric_memory`) one kernel does all of it; elsewhere, and for more rows than pay there, NCCL sums and one
kernel adds and norms. One rank alone sums nothing. Does not know layers (`fused_layers`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from dsserve.core.errors import LoadError
from dsserve.parallel.collectives import agree_on_least, all_reduce
from dsserve.parallel.rank import RankInfo
from dsserve.parallel.symmetric_memory import Peers, most_rows, share_memory

logger = logging.getLogger(__name__)

# How often a sum that is tried at load looks for the other ranks' parts: about a second.
_TRIED_SPINS = 1_000_000


class RankSum:
    """Sums of all layers that lie at the same place of theirs. Two take turns, through all steps (see
    `symmetric_memory`).

    Args:
        world_size: number of ranks.
        peers: where the ranks read each other's parts; None = NCCL.
    """

    def __init__(self, world_size: int, peers: Peers | None) -> None:
        self._world_size = world_size
        self._peers = peers
        self._taken: torch.Tensor | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the ranks' memory is used, up to some number of rows."""
        return self._peers is not None

    @property
    def way(self) -> str:
        """How, for the log."""
        if self._world_size == 1:
            return "nothing"
        return "over NCCL" if self._peers is None else f"up to {self._peers.own.shape[0]} rows in the ranks' memory"

    def take(self, rows: int) -> torch.Tensor | None:
        """The memory `[rows, H]` to write this rank's part to; None = any will do."""
        fits = self._peers is not None and rows <= self._peers.own.shape[0]
        self._taken = self._peers.own[:rows] if fits and self._peers is not None else None
        return self._taken

    def add_norm(
        self, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual` + the ranks' sum of `part`, and the norm of that, `[..., H]` each.

        Raises:
            LoadError: the part is not what was written to the memory that `take` gave.
        """
        from dsserve.parallel.rank_sum_triton import add_norm

        taken, self._taken = self._taken, None
        if taken is not None and taken.data_ptr() != part.data_ptr():
            raise LoadError("the model changes a row-parallel layer's result; set handler.compiled_ops: false")
        if taken is None and self._world_size > 1:
            all_reduce(part)
        width = residual.shape[-1]
        peers = None if taken is None else self._peers
        total, normed = add_norm(part.reshape(-1, width), residual.reshape(-1, width), weight, eps, peers)
        return total.view(residual.shape), normed.view(residual.shape)

    def is_exact(self) -> bool:
        """Whether the peers' memory gives the sum of random parts, rounded once; True without peers.

        All ranks must call it. Waits a second for the others at most, once all have compiled the kernel.
        """
        from dsserve.parallel.rank_sum_triton import add_norm

        peers = self._peers
        if peers is None:
            return True
        like = peers.own
        generator = torch.Generator(like.device).manual_seed(peers.rank)
        part = torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)
        residual, weight = torch.zeros_like(part), torch.ones_like(part[0])
        peers.own.copy_(part)
        add_norm(peers.own, residual, weight, 1e-6, peers, spins=0)
        torch.cuda.synchronize()
        torch.distributed.barrier()
        peers.late.zero_()
        found, _ = add_norm(peers.own, residual, weight, 1e-6, peers, spins=_TRIED_SPINS)
        total = all_reduce(part.double()).to(part.dtype)  # NCCL rounds after each rank, in the parts' own dtype
        # The kernel adds in fp32: a part's few ones are rounded there, and so may then be their sum.
        atol = 8 * peers.world_size * torch.finfo(torch.float32).eps
        return torch.allclose(found, total, rtol=torch.finfo(part.dtype).eps, atol=atol) and not peers.late.item()


def make_rank_sums(module: Any, rank: RankInfo, rows: int) -> tuple[RankSum, RankSum]:
    """The two sums of each layer of a sharded model, over peers' memory where it gives right ones; all ranks call it.

    Args:
        rows: more than that go over NCCL; fewer rows may be fast there (`symmetric_memory.most_rows`), and so many have
            memory.
    """
    like = next(module.parameters())
    width = module.config.get_text_config().hidden_size
    rows = min(rows, most_rows(rank.world_size, width, like.dtype))
    peers: list[Peers] = share_memory(rank, rows, width, like.dtype, like.device) if rank.world_size > 1 else []
    sums = [RankSum(rank.world_size, peer) for peer in peers]
    exact = [rank_sum.is_exact() for rank_sum in sums]
    if sums and not agree_on_least(int(all(exact)), rank):
        logger.warning("[dsserve] the ranks' memory does not give right sums: all-reduces over NCCL")
        sums = []
    if peers:
        torch.cuda.empty_cache()  # of the random parts
    first, second = sums or [RankSum(rank.world_size, None) for _ in range(2)]
    return first, second
