"""What a load knows of its model lies in `ShardedModel`: DeepSpeed's own engine gets no attribute of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsserve import get_ds_engine
from dsserve.loading import ds_engine
from dsserve.loading.ds_engine import shard_model
from tests.contract.tiny import save_model
from tests.support.contexts import make_context


class Sealed:
    """DeepSpeed's engine as a handler may use it: nothing can be hung on it."""

    __slots__ = ("module",)

    def __init__(self, engine: Any) -> None:
        self.module = engine.module


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    init = ds_engine._init_inference
    monkeypatch.setattr(ds_engine, "_init_inference", lambda *arguments: Sealed(init(*arguments)))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def context(folder: Path, **deepspeed: Any) -> Any:
    return make_context(folder, {"deviceType": "cpu", "deepspeed": {"dtype": "fp32", **deepspeed}})


@pytest.mark.usefixtures("sealed")
def test_a_load_hangs_nothing_on_deepspeeds_engine(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    # A CPU has no kernels to inject: `auto` refuses them.
    sharded = shard_model(load(folder), context(folder, replace_with_kernel_inject="auto"))
    assert isinstance(sharded.engine, Sealed) and sharded.module is sharded.engine.module
    assert sharded.workspace is None and "GPU" in str(sharded.injection_refused)
    assert sharded.self_check is not None
    ids = sharded.self_check.token_ids
    with torch.inference_mode():
        torch.testing.assert_close(sharded.module(ids[None]).logits[0], load(folder)(ids[None]).logits[0])


@pytest.mark.usefixtures("sealed")
def test_a_handler_of_ones_own_gets_deepspeeds_engine(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    engine = get_ds_engine(load(folder), context(folder, self_check=False))
    assert isinstance(engine, Sealed) and type(engine.module).__name__ == "LlamaForCausalLM"
    assert shard_model(load(folder), context(folder, self_check=False)).self_check is None
