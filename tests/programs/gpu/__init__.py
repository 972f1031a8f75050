"""Run by tests/gpu, and the parity table by hand."""
