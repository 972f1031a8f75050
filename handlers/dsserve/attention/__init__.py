"""Attention of our own over the KV cache: of decode steps and of prompts."""
