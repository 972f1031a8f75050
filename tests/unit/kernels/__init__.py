"""Tests of `dsserve.kernels`."""
