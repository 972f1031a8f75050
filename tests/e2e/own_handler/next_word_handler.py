"""A handler of one's own: the next word after a prompt, by a model that DeepSpeed shards."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsserve import BaseDeepSpeedHandler, get_ds_engine


class NextWordHandler(BaseDeepSpeedHandler):
    def initialize(self, ctx):
        super().initialize(ctx)  # rank, device, process group
        path = Path(ctx.system_properties["model_dir"]) / ctx.model_yaml_config["handler"]["model_path"]
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        ds_engine = get_ds_engine(model, ctx)
        self.model = ds_engine.module
        self.initialized = True

    def preprocess(self, requests):
        prompts = [request.get("data") or request.get("body") for request in requests]
        return self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)

    @torch.inference_mode()
    def inference(self, inputs):
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(dim=-1)

    def postprocess(self, tokens):
        return [self.tokenizer.decode(token).strip() for token in tokens]
