"""What makes DeepSpeed's injected layers right on today's transformers: refusals, repairs, adapters, KV workspace."""
