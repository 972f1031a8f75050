"""One rank of `load`: loads a model in one of three ways and notes seconds and memory.

Runs under torchrun: way, model folder, device, folder for the result.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dsserve.config.handler import HandlerConfig
from dsserve.loading import shard_cache
from dsserve.loading.ds_engine import shard_model
from dsserve.loading.hf_model import load_weights
from dsserve.loading.load_clock import LoadClock, own_bytes
from dsserve.worker.base_handler import BaseDeepSpeedHandler
from dsserve.worker.load import find_model
from scripts.common.context import make_context

SAMPLE_S = 0.005
CPU = torch.device("cpu")


class Peak:
    """The most memory of the process's own, above what it was at the start; sampled every 5 ms."""

    def __init__(self) -> None:
        self._before = self._most = own_bytes(CPU)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, own_bytes(CPU))
            time.sleep(SAMPLE_S)

    @property
    def bytes(self) -> int:
        return self._most - self._before

    @property
    def held(self) -> int:
        return own_bytes(CPU) - self._before


class LoadRank(BaseDeepSpeedHandler):
    """A handler that only loads."""

    def load(self, way: str, model: Path, device: str) -> dict[str, Any]:
        """Seconds of each phase, host memory at its peak and at the end, device memory at its peak, in bytes."""
        yaml_config = {"deviceType": device, "deepspeed": {"dtype": "bf16"}}
        context = make_context("load", model, yaml_config)
        self.initialize(context)
        import deepspeed
        import transformers.models.llama.modeling_llama  # noqa: F401  imported before the memory counts

        peak, clock = Peak(), LoadClock(self.rank.rank, self.device)
        module = self._plain(model, clock, deepspeed) if way == "plain" else self._ours(way, model, context, clock)
        time.sleep(2 * SAMPLE_S)
        on_device = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        weights = sum(parameter.nbytes for parameter in module.parameters())
        found = {"peak": peak.bytes, "held": peak.held, "device": on_device, "weights": weights}
        return {**found, "seconds": clock.seconds}

    def _plain(self, model: Path, clock: LoadClock, deepspeed: Any) -> Any:
        """What DeepSpeed's documentation shows, in every rank."""
        from transformers import AutoModelForCausalLM

        with clock.phase("from_pretrained"):
            whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        with clock.phase("init_inference"):
            settings = {"dtype": torch.bfloat16, "tensor_parallel": {"tp_size": self.rank.world_size}}
            return deepspeed.init_inference(whole, config=settings).module

    def _ours(self, way: str, model: Path, context: Any, clock: LoadClock) -> Any:
        config, shards = HandlerConfig(model_path=str(model)), None
        with clock.phase("files"):
            found = find_model(context, config, model, self.rank.world_size)
            if way == "cache":
                shards = shard_cache.find_shards(found.manifest, found.cache, self.rank)
                assert shards is not None, "no shards: write them with make shard"
            whole = found.outline if shards else load_weights(config, model)
        return shard_model(whole, context, shards, clock).module


def main() -> None:
    way, model, device, folder = sys.argv[1:]
    rank = LoadRank()
    found = rank.load(way, Path(model), device)
    Path(folder, f"{rank.rank.rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
