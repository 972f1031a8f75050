"""One rank of `shard`: loads and cuts the model as the handler does, proves it, and writes its part.

Runs under torchrun with one argument, the folder of its settings.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from dsserve.config.handler import read_handler_config
from dsserve.core.errors import LoadError
from dsserve.loading import shard_cache
from dsserve.loading.ds_engine import shard_model
from dsserve.loading.hf_model import load_weights
from dsserve.parallel.kv_heads import plan_kv_copies
from dsserve.worker.base_handler import BaseDeepSpeedHandler
from dsserve.worker.load import find_model
from dsserve.worker.load_guard import LoadGuard
from scripts.common.context import make_context


class ShardRank(BaseDeepSpeedHandler):
    """The handler's load, with the shards written at its end."""

    def write(self, yaml_config: dict[str, Any], model_dir: Path) -> Path:
        """Returns the folder of the shards. Raises LoadError, on all ranks the same."""
        with LoadGuard(str((yaml_config.get("handler") or {}).get("model_path", "the model"))).load() as guard:
            folder = self._write(yaml_config, model_dir)
            guard.meet("the end")
            return folder

    def _write(self, yaml_config: dict[str, Any], model_dir: Path) -> Path:
        context = make_context("shard", model_dir, yaml_config)
        self.initialize(context)
        config = read_handler_config(yaml_config)
        found = find_model(context, config, model_dir, self.rank.world_size)
        plan_kv_copies(found.outline, self.rank.world_size)
        if found.settings.kernel_inject and not found.settings.may_fall_back:
            raise LoadError(
                "shards are AutoTP's; with replace_with_kernel_inject: true every start reads the whole model. Set it "
                "to false or auto"
            )
        sharded = shard_model(load_weights(config, found.folder), context)
        cache = Path(config.shard_cache or found.cache)
        return shard_cache.write_shards(sharded.module, sharded.self_check, found.manifest, cache, self.rank)


def main() -> None:
    import torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(sys.argv[1])
    rank = ShardRank()
    try:
        written = rank.write(json.loads((folder / "model-config.json").read_text()), folder)
    except LoadError as error:
        (folder / "error").write_text(str(error))
        sys.exit(1)
    if rank.rank.is_leader:
        (folder / "result.json").write_text(json.dumps({"folder": str(written)}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
