"""GPU memory that all ranks of a host can read: where they lay their parts of a sum for each other (`rank_sum`).

torch's symmetric memory (torch 2.11), without multicast. Does not compute, and is not there where GPUs cannot reach
each other's memory.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from dsserve.core.errors import LoadError, first_line
from dsserve.parallel.collectives import agree_on_least
from dsserve.parallel.rank import RankInfo

logger = logging.getLogger(__name__)

# Every rank reads all parts, so a sum moves (ranks - 1) times its size to each: beyond these bytes of a part, by the
# number of ranks, NCCL's ring moves less. `scripts.bench.rank_sum` on H100s (microseconds, NCCL): 2 ranks 6.1 (8.5) at
# 8 KiB, 114 (181) at 32 MiB; 4 ranks 8.0 (12.2) at 8 KiB, 28.8 (28.8) at 2 MiB. 8 ranks: an estimate from these.
_MOST_BYTES = {2: 2**62, 4: 2 * 2**20, 8: 512 * 2**10}


@dataclass(frozen=True)
class Peers:
    """One place for a sum's parts on all ranks.

    Attributes:
        own: `[rows, H]`, this rank's part.
        places: `[ranks]`, int64, the addresses of all parts.
        flags: `[ranks]`, int64, the addresses of the ranks' flags, `[rows, ranks]` in int32: how many sums of a row
            each rank has begun, written by that rank.
        epochs: `[rows]`, int32, how many sums of a row this rank has begun.
        late: `[1]`, int32, not 0 after a sum that did not wait for all ranks.
        held: what the addresses point into.
    """

    rank: int
    world_size: int
    own: torch.Tensor
    places: torch.Tensor
    flags: torch.Tensor
    epochs: torch.Tensor
    late: torch.Tensor
    held: tuple[Any, ...]


def most_rows(world_size: int, width: int, dtype: torch.dtype) -> int:
    """The rows of a part `[rows, width]` up to which so many ranks sum faster in their memory than over NCCL."""
    most_bytes = next((size for ranks, size in _MOST_BYTES.items() if ranks >= world_size), 0)
    return most_bytes // (width * dtype.itemsize)


def share_memory(rank: RankInfo, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Peers]:
    """Two places for parts `[rows, width]`, or none where the ranks cannot read each other's memory. All ranks call it.

    Double buffering: a rank writes its next part to one place while its peers still read the other. Before it writes to
    the first place again, all ranks have announced the sum between, so nobody reads the first place any more. That
    holds while all ranks use the two places in turn, for the same rows.

    Raises:
        LoadError: the ranks can read each other's memory, but torch cannot exchange it.
    """
    reason = "too many ranks, or too wide" if rows < 1 else _why_out_of_reach(rank, device)
    if not agree_on_least(int(not reason), rank):
        if rank.is_leader:
            logger.info("[dsserve] all-reduces over NCCL: %s", reason or "another rank's GPU is out of reach")
        return []
    from torch.distributed import _symmetric_memory as symmetric_memory

    group: Any = torch.distributed.group.WORLD
    try:
        values = symmetric_memory.empty(2, rows, width, dtype=dtype, device=device)
        flags = symmetric_memory.empty(rows, rank.world_size, dtype=torch.int32, device=device)
        values.zero_(), flags.zero_()
        handles = [symmetric_memory.rendezvous(tensor, group) for tensor in (values, flags)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the other ranks wait within the exchange: there is no way back to NCCL
        raise LoadError(
            f"the ranks cannot exchange GPU memory ({first_line(error)}): set handler.compiled_ops: false, or use one "
            "container"
        ) from None
    torch.cuda.synchronize(device)
    torch.distributed.barrier()
    ranks, held = range(rank.world_size), (values, flags, *handles)
    of_values, of_flags = (
        [handle.get_buffer(peer, tensor.shape, tensor.dtype).data_ptr() for peer in ranks]
        for handle, tensor in zip(handles, (values, flags), strict=True)
    )
    place_bytes = values[0].numel() * values.element_size()
    addresses = [[address + place * place_bytes for address in of_values] for place in range(2)]
    flag_addresses = torch.tensor(of_flags, device=device)
    epochs, late = (torch.zeros(size, dtype=torch.int32, device=device) for size in (rows, 1))
    return [
        Peers(rank.rank, rank.world_size, own, torch.tensor(places, device=device), flag_addresses, epochs, late, held)
        for own, places in zip(values, addresses, strict=True)
    ]


def _why_out_of_reach(rank: RankInfo, device: torch.device) -> str:
    """Why the ranks cannot read each other's memory; empty where they can."""
    if rank.local_world_size != rank.world_size:
        return "the ranks are on several hosts"
    if device.type != "cuda":
        return "no GPU"
    pairs = itertools.permutations(range(rank.world_size), 2)
    if not all(torch.cuda.can_device_access_peer(*pair) for pair in pairs):
        return "the GPUs cannot read each other's memory"
    return ""
