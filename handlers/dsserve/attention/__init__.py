"""Attention of a step's segments over the pages of the KV cache."""
