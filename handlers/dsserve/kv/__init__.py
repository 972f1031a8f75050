"""The KV cache: pages of keys and values, which text holds which of them, and what may be found again."""
