"""Kernel injection on stand-ins for DeepSpeed's kernels, or on the kernels."""
