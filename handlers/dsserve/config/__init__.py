"""The sections of model-config.yaml (handler, deepspeed, TorchServe's own), and limits that follow."""
