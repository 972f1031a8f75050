"""A user's own handler: a BERT encoder with DeepSpeed's kernels, token ids in, mean hidden states out.

On a CPU over the stand-in of the kernels.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModel

from dsserve import BaseDeepSpeedHandler, get_ds_engine


class EncoderHandler(BaseDeepSpeedHandler):
    def initialize(self, ctx: Any) -> None:
        super().initialize(ctx)
        if self.device.type == "cpu":
            from tests.programs.injection.kernels import install

            install()
        model = AutoModel.from_pretrained(ctx.model_yaml_config["handler"]["model_path"], dtype="auto").eval()
        self.model = get_ds_engine(model, ctx).module
        self.initialized = True

    def preprocess(self, requests: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [(request.get("data") or request.get("body"))["ids"] for request in requests]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @torch.inference_mode()
    def inference(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden, mask = self.model(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def postprocess(self, means: torch.Tensor) -> list[str]:
        return [json.dumps(row) for row in means.tolist()]
