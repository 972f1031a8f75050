"""What the device could do at best: its measured read bandwidth, and the bytes that a decode step has to read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from dsserve.modeling.dtype import model_dtype
from dsserve.parallel.kv_heads import head_size

READ_BYTES = {"cuda": 2**32, "cpu": 2**28}
REPEATS = 10


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads, the best of several; all ranks measure at the same time."""
    values = torch.zeros(READ_BYTES[device.type] // 4, device=device)
    best = 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        values.sum().item()  # waits for the device
        best = max(best, values.nbytes / (time.perf_counter() - started))
    return best


@dataclass(frozen=True)
class StepBytes:
    """Bytes of this rank that a decode step reads: its weights without the table of embeddings, and a token's keys and
    values in all layers."""

    weights: int
    kv_a_token: int

    @classmethod
    def of(cls, module: Any, ranks: int) -> StepBytes:
        """Of a sharded module whose weights are not packed yet."""
        config = module.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dtype = model_dtype(module)
        table = module.get_input_embeddings().weight
        tied = table is module.get_output_embeddings().weight
        weights = sum(weight.nbytes for weight in module.parameters()) - (0 if tied else table.nbytes)
        return cls(weights, 2 * config.num_hidden_layers * -(-heads // ranks) * head_size(config) * dtype.itemsize)

    def total(self, rows: int, context: float) -> float:
        """Of a step of so many rows, each so long on average."""
        return self.weights + rows * context * self.kv_a_token


def held_bytes(device: torch.device) -> dict[str, int]:
    """Memory of this rank: at its peak, by torch, and on the device by all processes together."""
    if device.type != "cuda":
        from dsserve.loading.load_clock import own_bytes

        return {"peak": own_bytes(device), "device": own_bytes(device)}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak": torch.cuda.max_memory_allocated(device), "device": total - free}
