"""Run by tests/distributed on several ranks."""
